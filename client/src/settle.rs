//! Batches outcomes: while one `SettleTasks` call is in flight, the items of the next one collect.
//!
//! Guarantees: Each caller gets the outcome of its own item. Writes about one run keep their order. A call whose answer
//! was lost is repeated, and the server answers as the first time. A call that gets no answer delays only the runs that
//! it names.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use absurd_proto::v1 as pb;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Code, Request};

use crate::backoff::Backoff;
use crate::replicas::Replicas;
use crate::{Error, Reason};

/// Maximum number of items in one call.
const ITEMS_MAX: usize = 1000;
/// Maximum number of bytes in one call; a larger item is sent alone.
const BYTES_MAX: usize = 2 * 1024 * 1024;
/// Longest time for which a call in flight holds back the next one.
const LONG: Duration = Duration::from_millis(250);
/// Maximum number of calls in flight per queue.
const CALLS_MAX: usize = 16;

struct Entry {
    item: pb::SettleItem,
    deadline: Instant,
    answer: oneshot::Sender<Result<pb::SettleResult, Error>>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Entry>,
    arrived: Arc<Notify>,
}

type Lanes = Arc<Mutex<HashMap<String, Lane>>>;

/// Sends outcomes, batched per queue.
#[derive(Clone)]
pub(crate) struct Settler {
    replicas: Replicas,
    /// A lane exists while a Tokio task drives it.
    lanes: Lanes,
}

impl std::fmt::Debug for Settler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Settler(..)")
    }
}

impl Settler {
    pub(crate) fn new(replicas: Replicas) -> Self {
        Self { replicas, lanes: Lanes::default() }
    }

    /// Sends one outcome, together with the other items that wait for this queue.
    pub(crate) async fn submit(
        &self,
        queue: &str,
        item: pb::SettleItem,
        deadline: Instant,
    ) -> Result<pb::SettleResult, Error> {
        let (answer, answered) = oneshot::channel();
        let entry = Entry { item, deadline, answer };
        {
            let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(lane) = lanes.get_mut(queue) {
                lane.waiting.push_back(entry);
                lane.arrived.notify_one();
            } else {
                let waiting = VecDeque::from([entry]);
                lanes.insert(queue.to_owned(), Lane { waiting, ..Lane::default() });
                tokio::spawn(drive(self.replicas.clone(), Arc::clone(&self.lanes), queue.to_owned()));
            }
        }
        answered.await.unwrap_or_else(|_| Err(Error::new(Reason::Transport, Code::Unavailable, "the client stopped")))
    }
}

async fn drive(replicas: Replicas, lanes: Lanes, queue: String) {
    let mut calls: JoinSet<Vec<String>> = JoinSet::new();
    // Runs that the calls in flight name.
    let mut busy = HashSet::new();
    loop {
        let (batch, arrived) = {
            let mut lanes = lanes.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(lane) = lanes.get_mut(&queue) else { return };
            if lane.waiting.is_empty() && calls.is_empty() {
                lanes.remove(&queue);
                return;
            }
            (take(&mut lane.waiting, &busy), Arc::clone(&lane.arrived))
        };
        let sent = !batch.is_empty();
        if sent {
            let runs: Vec<String> = batch.iter().map(|entry| run(&entry.item).to_owned()).collect();
            busy.extend(runs.iter().cloned());
            let (replicas, queue) = (replicas.clone(), queue.clone());
            calls.spawn(async move {
                send(&replicas, &queue, batch).await;
                runs
            });
        }
        let more = async {
            if sent {
                tokio::time::sleep(LONG).await;
            } else {
                arrived.notified().await;
            }
        };
        let full = calls.len() >= CALLS_MAX;
        tokio::select! {
            Some(done) = calls.join_next() => {
                for run in done.unwrap_or_default() {
                    busy.remove(&run);
                }
                if calls.is_empty() {
                    // A call that panicked did not return its runs.
                    busy.clear();
                }
            }
            () = more, if !full => {}
        }
    }
}

/// Key of the item's run: the run id, or the claim token where there is no id.
fn run(item: &pb::SettleItem) -> &str {
    if item.run_id.is_empty() { item.claim_token.as_deref().unwrap_or_default() } else { &item.run_id }
}

/// Takes the next batch; items of a busy run stay, in their order.
fn take(waiting: &mut VecDeque<Entry>, busy: &HashSet<String>) -> Vec<Entry> {
    let mut bytes = 0;
    let (mut batch, mut stays) = (Vec::new(), VecDeque::new());
    while let Some(entry) = waiting.pop_front() {
        if busy.contains(run(&entry.item)) {
            stays.push_back(entry);
            continue;
        }
        let size = size(&entry.item);
        if batch.len() == ITEMS_MAX || (bytes + size > BYTES_MAX && !batch.is_empty()) {
            waiting.push_front(entry);
            break;
        }
        bytes += size;
        batch.push(entry);
    }
    stays.append(waiting);
    *waiting = stays;
    batch
}

fn size(item: &pb::SettleItem) -> usize {
    use pb::settle_item::Action;
    let json = |json: &Option<pb::Json>| json.as_ref().map_or(0, |json| json.text.len());
    200 + match &item.action {
        Some(Action::Complete(action)) => json(&action.result),
        Some(Action::Fail(action)) => json(&action.reason),
        Some(Action::Checkpoint(action)) => json(&action.state) + action.checkpoint_name.len(),
        Some(Action::Extend(_) | Action::Release(_)) | None => 0,
    }
}

/// Repeats a batch until every item is answered. An item whose deadline passes is answered with the last error.
async fn send(replicas: &Replicas, queue: &str, mut batch: Vec<Entry>) {
    let mut backoff = Backoff::call();
    loop {
        batch.retain(|entry| !entry.answer.is_closed());
        let now = Instant::now();
        let Some(longest) = batch.iter().map(|entry| entry.deadline.saturating_duration_since(now)).max() else {
            return;
        };
        let items = batch.iter().map(|entry| entry.item.clone()).collect();
        let mut request = Request::new(pb::SettleTasksRequest { queue: queue.to_owned(), items });
        request.set_timeout(longest.max(Duration::from_millis(1)));
        let asked = replicas.ask();
        let error = match asked.grpc().settle_tasks(request).await {
            Ok(response) => {
                asked.worked();
                batch = answer(batch, response.into_inner().results);
                continue;
            }
            Err(status) => Error::from(status),
        };
        let wait = if asked.failed(&error) { Duration::ZERO } else { backoff.after(&error) };
        drop(asked);
        let until = Instant::now() + wait;
        let (left, over): (Vec<_>, Vec<_>) =
            batch.into_iter().partition(|entry| error.is_passing() && entry.deadline > until);
        for entry in over {
            let _ = entry.answer.send(Err(error.clone()));
        }
        if left.is_empty() {
            return;
        }
        batch = left;
        tokio::time::sleep(wait).await;
    }
}

/// Gives each caller its outcome. Returns the items that were skipped because an earlier item of the same run failed.
/// They are sent again, so that each caller gets the outcome of its own item.
fn answer(batch: Vec<Entry>, results: Vec<pb::SettleResult>) -> Vec<Entry> {
    let mut results = results.into_iter();
    let mut skipped = Vec::new();
    for entry in batch {
        let outcome = match results.next() {
            None => Err(crate::wire::unclear()),
            Some(result) => match &result.error {
                Some(error) => Err(Error::of_item(error)),
                None => Ok(result),
            },
        };
        if matches!(&outcome, Err(error) if error.reason() == Reason::ItemSkipped) && entry.deadline > Instant::now() {
            skipped.push(entry);
        } else {
            let _ = entry.answer.send(outcome);
        }
    }
    skipped
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;

    type Answered = oneshot::Receiver<Result<pb::SettleResult, Error>>;

    /// An entry that completes the run with a result of this many bytes.
    fn entry(run_id: &str, bytes: usize) -> (Entry, Answered) {
        let result = Some(pb::Json { text: "x".repeat(bytes) });
        let action = pb::settle_item::Action::Complete(pb::CompleteAction { result });
        let item = pb::SettleItem { run_id: run_id.to_owned(), claim_token: None, action: Some(action) };
        let (answer, answered) = oneshot::channel();
        (Entry { item, deadline: Instant::now() + Duration::from_secs(30), answer }, answered)
    }

    fn waiting(items: &[(&str, usize)]) -> VecDeque<Entry> {
        items.iter().map(|(run_id, bytes)| entry(run_id, *bytes).0).collect()
    }

    /// Run and size of the result of each entry, in order.
    fn items<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<(&'a str, usize)> {
        entries.into_iter().map(|entry| (run(&entry.item), size(&entry.item) - 200)).collect()
    }

    /// Items of a run wait, in their order, while a call about that run is in flight; they delay no other item.
    #[test]
    fn a_busy_run_holds_up_only_itself() {
        let mut waiting = waiting(&[("a", 1), ("b", 2), ("a", 3), ("c", 4)]);
        let batch = take(&mut waiting, &HashSet::from(["a".to_owned()]));
        assert_eq!(items(&batch), [("b", 2), ("c", 4)]);
        assert_eq!(items(&waiting), [("a", 1), ("a", 3)]);
        let batch = take(&mut waiting, &HashSet::new());
        assert_eq!(items(&batch), [("a", 1), ("a", 3)]);
        assert!(waiting.is_empty());
    }

    /// A batch holds at most 1,000 items and 2 MiB; a larger item is sent alone.
    #[test]
    fn a_batch_has_its_bounds() {
        let mut many: VecDeque<Entry> = (0..=ITEMS_MAX).map(|number| entry(&number.to_string(), 1).0).collect();
        assert_eq!(take(&mut many, &HashSet::new()).len(), ITEMS_MAX);
        assert_eq!(many.len(), 1);
        let half = BYTES_MAX / 2;
        let mut large = waiting(&[("a", 1), ("b", BYTES_MAX), ("c", half), ("d", half), ("e", 1)]);
        let mut batches = Vec::new();
        while !large.is_empty() {
            let batch = take(&mut large, &HashSet::new());
            batches.push(batch.iter().map(|entry| run(&entry.item)).collect::<String>());
        }
        assert_eq!(batches, ["a", "b", "c", "de"]);
    }

    /// Each caller gets the outcome of its own item. A skipped item is sent again unless its deadline has passed; an
    /// item without an answer is an error.
    #[test]
    fn a_skipped_item_is_sent_again() {
        let refused = |reason: &str| pb::SettleResult {
            error: Some(pb::SettleError { code: 9, reason: reason.to_owned(), ..Default::default() }),
            ..Default::default()
        };
        let (mut batch, mut answered): (Vec<Entry>, Vec<Answered>) =
            ["a", "b", "c", "d", "e"].map(|run_id| entry(run_id, 1)).into_iter().unzip();
        batch[2].deadline = Instant::now();
        let skipped = || refused(Reason::ItemSkipped.as_str());
        let lost = refused(Reason::ClaimLost.as_str());
        let again = answer(batch, vec![lost, skipped(), skipped(), pb::SettleResult::default()]);
        assert_eq!(items(&again), [("b", 1)]);
        let mut heard = |index: usize| {
            let outcome = answered[index].try_recv()?;
            Ok::<_, TryRecvError>(outcome.map(drop).map_err(|error| error.reason()))
        };
        assert_eq!(heard(0), Ok(Err(Reason::ClaimLost)));
        assert_eq!(heard(1), Err(TryRecvError::Empty));
        assert_eq!(heard(2), Ok(Err(Reason::ItemSkipped)));
        assert_eq!(heard(3), Ok(Ok(())));
        assert_eq!(heard(4), Ok(Err(Reason::Other)));
    }
}
