//! A claim stream that stays: it reconnects for ever, hands held tokens back in, keeps leases, and ends only when asked.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use absurd_proto::v1 as pb;
use absurd_proto::v1::claim_stream_response::Message;
use futures_util::future::join_all;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::{Request, Streaming};
use uuid::Uuid;

use crate::backoff::{Backoff, random};
use crate::claimed::ClaimedTask;
use crate::connect::MESSAGE_BYTES_MAX;
use crate::registry::Revoked;
use crate::{AbsurdClient, Error, Reason, wire};

/// Claims of one `ExtendClaims` call.
const EXTEND_MAX: usize = 1000;
/// Longest time for telling the server that a stream is about to end.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// A stream that was open for so long is opened again at once; one that breaks sooner, ever more rarely.
const STEADY: Duration = Duration::from_secs(10);
/// Longest time for a stream's first message.
const OPEN_MAX: Duration = Duration::from_secs(15);

/// What to ask the server for; it has the last word.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// Tasks in flight at most, 1 to 10,000.
    pub max_in_flight: i32,
    /// Lease of each claim; kept by the stream while the task is worked on.
    pub claim_timeout: Duration,
    /// A task that reached nobody is given back after this long, or with the end of its lease where that comes first.
    pub start_deadline: Option<Duration>,
    /// When this process is lost, its tasks move on after this long.
    pub reconnect_grace: Option<Duration>,
    /// Only tasks of these names; empty: all.
    pub task_names: Vec<String>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            max_in_flight: 1,
            claim_timeout: Duration::from_secs(30),
            start_deadline: Some(Duration::from_secs(10)),
            reconnect_grace: Some(Duration::from_secs(15)),
            task_names: Vec::new(),
        }
    }
}

impl StreamOptions {
    /// A deadline beyond the lease would say nothing; the server refuses it.
    fn start_deadline(&self) -> Option<Duration> {
        self.start_deadline.map(|deadline| deadline.min(self.claim_timeout))
    }
}

/// Tasks as they come. Dropping it ends the stream at once; [`ClaimStream::close`] does so politely.
#[derive(Debug)]
pub struct ClaimStream {
    tasks: mpsc::UnboundedReceiver<ClaimedTask>,
    inside: Arc<Inside>,
    driver: JoinHandle<()>,
    keeper: JoinHandle<()>,
}

#[derive(Debug)]
struct Inside {
    client: AbsurdClient,
    options: StreamOptions,
    session_id: String,
    /// Id of this stream among the client's.
    id: u64,
    /// True once the stream shall end.
    closing: watch::Sender<bool>,
    /// Between extensions; the server dictates it.
    extend_every: watch::Sender<Duration>,
    /// New tasks should show a sign of life soon.
    arrived: Notify,
    /// Why the stream is not open, once opening it again has failed.
    trouble: watch::Sender<Option<Error>>,
}

impl ClaimStream {
    pub(crate) async fn open(client: &AbsurdClient, options: StreamOptions) -> Result<Self, Error> {
        let extend_every = options.claim_timeout / 3;
        let inside = Arc::new(Inside {
            client: client.clone(),
            session_id: Uuid::new_v4().to_string(),
            id: client.shared.next_stream.fetch_add(1, Ordering::Relaxed),
            closing: watch::Sender::new(false),
            extend_every: watch::Sender::new(extend_every),
            arrived: Notify::new(),
            trouble: watch::Sender::new(None),
            options,
        });
        let until = client.deadline();
        let mut backoff = Backoff::call();
        let first = loop {
            match inside.connect(OPEN_MAX.min(until.saturating_duration_since(Instant::now()))).await {
                Ok(first) => break first,
                Err(error) => {
                    let wait = backoff.after(&error);
                    if !error.is_passing() || Instant::now() + wait > until {
                        return Err(error);
                    }
                    tokio::time::sleep(wait).await;
                }
            }
        };
        let (tell, tasks) = mpsc::unbounded_channel();
        let driver = tokio::spawn(drive(Arc::clone(&inside), first, tell));
        let keeper = tokio::spawn(keep(Arc::clone(&inside)));
        Ok(Self { tasks, inside, driver, keeper })
    }

    /// The next task; None after [`ClaimStream::close`].
    pub async fn next(&mut self) -> Option<ClaimedTask> {
        self.tasks.recv().await
    }

    /// Why the stream is not open: None while it is, the error of the last try once opening it again has failed. A stream
    /// that a replica ends politely and that opens at once elsewhere shows nothing here.
    pub fn trouble(&self) -> watch::Receiver<Option<Error>> {
        self.inside.trouble.subscribe()
    }

    /// Ends the stream: no more tasks; those that nobody took go back without using up an attempt. Leases of tasks that
    /// are still worked on are kept until they are settled, or until `limit` has passed.
    pub async fn close(mut self, limit: Duration) -> Result<(), Error> {
        let until = Instant::now() + limit;
        // The server shall hear that this end is meant: it cuts no lease then, and looks for no lost worker.
        let inside = Arc::clone(&self.inside);
        let request =
            pb::DrainWorkerRequest { queue: inside.client.queue_name().into(), session_id: inside.session_id.clone() };
        let told = inside
            .client
            .call(request, DRAIN_MAX.min(limit), |mut grpc, request| async move { grpc.drain_worker(request).await });
        if let Err(error) = told.await {
            tracing::debug!(%error, "could not tell the server that the stream ends");
        }
        self.inside.closing.send_replace(true);
        let _ = (&mut self.driver).await;
        self.tasks.close();
        let mut undelivered = Vec::new();
        while let Some(task) = self.tasks.recv().await {
            undelivered.push(task);
        }
        let giving = undelivered.iter().map(|task| async move {
            let released = tokio::time::timeout_at(until, task.release(Duration::ZERO)).await;
            if !matches!(released, Ok(Ok(()))) {
                tracing::debug!(run.id = %task.run_id, "a task could not be given back; its lease will run out");
            }
        });
        join_all(giving).await;
        drop(undelivered);
        let registry = &self.inside.client.shared.registry;
        while Instant::now() < until && !registry.kept_by(self.inside.id).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

impl Drop for ClaimStream {
    fn drop(&mut self) {
        self.inside.closing.send_replace(true);
        self.keeper.abort();
    }
}

impl Inside {
    fn request(&self, held: &[(Uuid, String)]) -> pb::ClaimStreamRequest {
        pb::ClaimStreamRequest {
            queue: self.client.queue_name().to_owned(),
            worker_id: self.client.worker_id().to_owned(),
            session_id: self.session_id.clone(),
            max_in_flight: self.options.max_in_flight,
            claim_timeout: Some(wire::duration(self.options.claim_timeout)),
            start_deadline: self.options.start_deadline().map(wire::duration),
            reconnect_grace: self.options.reconnect_grace.map(wire::duration),
            task_names: self.options.task_names.clone(),
            held_claim_tokens: held.iter().map(|(_, token)| token.clone()).collect(),
            max_message_bytes: i32::try_from(MESSAGE_BYTES_MAX).unwrap_or(i32::MAX),
            accepts_omitted_params: false,
        }
    }

    /// Opens the stream and reads its first message, within a limit.
    async fn connect(&self, limit: Duration) -> Result<Connected, Error> {
        let held = self.client.shared.registry.kept_by(self.id);
        let asked = self.client.shared.replicas.ask();
        let opening = async {
            let mut messages = asked.grpc().claim_stream(Request::new(self.request(&held))).await?.into_inner();
            match messages.message().await?.and_then(|response| response.message) {
                Some(Message::Opened(opened)) => Ok((opened, messages)),
                _ => Err(wire::unclear()),
            }
        };
        let opened = tokio::time::timeout(limit, opening).await.unwrap_or_else(|_| Err(no_answer()));
        match &opened {
            Ok(_) => asked.worked(),
            Err(error) => drop(asked.failed(error)),
        }
        let (opened, messages) = opened?;
        if let Some(every) = wire::span(opened.extend_interval.as_ref()).filter(|every| !every.is_zero()) {
            self.extend_every.send_replace(every);
        }
        // In the order of the request.
        for ((run_id, token), verdict) in held.iter().zip(&opened.held) {
            self.judge(*run_id, token, verdict.verdict);
        }
        let heartbeat = wire::span(opened.heartbeat_interval.as_ref()).unwrap_or(Duration::from_secs(15));
        Ok(Connected { messages, silence_max: heartbeat * 3 })
    }

    /// Takes in what the server says of a claim.
    fn judge(&self, run_id: Uuid, token: &str, verdict: i32) {
        let registry = &self.client.shared.registry;
        match pb::Verdict::try_from(verdict).unwrap_or_default() {
            pb::Verdict::Held | pb::Verdict::Busy | pb::Verdict::Unspecified => {}
            pb::Verdict::Lost | pb::Verdict::Invalid => registry.revoke(run_id, token, Revoked::Lost),
            pb::Verdict::Expired => registry.revoke(run_id, token, Revoked::Expired),
            pb::Verdict::Cancelled => registry.revoke(run_id, token, Revoked::Cancelled),
            pb::Verdict::Finished | pb::Verdict::Released => registry.remove(run_id, Some(token)),
        }
    }
}

struct Connected {
    messages: Streaming<pb::ClaimStreamResponse>,
    silence_max: Duration,
}

fn no_answer() -> Error {
    Error::new(Reason::Transport, tonic::Code::Unavailable, "the server did not answer in time")
}

/// Reads and reconnects until the stream shall end. Always drains the transport: whoever consumes slowly is bounded by
/// the stream's credit.
async fn drive(inside: Arc<Inside>, first: Connected, tell: mpsc::UnboundedSender<ClaimedTask>) {
    let mut closing = inside.closing.subscribe();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    let mut connected = Some(first);
    while !*closing.borrow_and_update() {
        let wait = match connected.take() {
            Some(open) => {
                let began = Instant::now();
                let end = tokio::select! {
                    end = read(&inside, open, &tell) => end,
                    _ = closing.changed() => return,
                };
                if began.elapsed() > STEADY {
                    backoff.reset();
                }
                match end {
                    End::Told(wait) => wait,
                    End::Broke(error) => backoff.after(&error),
                }
            }
            None => tokio::select! {
                result = inside.connect(OPEN_MAX) => match result {
                    Ok(open) => {
                        inside.trouble.send_replace(None);
                        connected = Some(open);
                        continue;
                    }
                    Err(error) => {
                        tracing::debug!(%error, queue.name = inside.client.queue_name(), "cannot open the claim stream");
                        let wait = backoff.after(&error);
                        inside.trouble.send_replace(Some(error));
                        wait
                    }
                },
                _ = closing.changed() => return,
            },
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = closing.changed() => return,
        }
    }
}

/// How a connection of the stream ended.
enum End {
    /// As the server said, which also says how long to wait before the next one.
    Told(Duration),
    /// By this fault.
    Broke(Error),
}

/// Reads one connection to its end.
async fn read(inside: &Inside, mut open: Connected, tell: &mpsc::UnboundedSender<ClaimedTask>) -> End {
    let broken = |why: &str| End::Broke(Error::new(Reason::Transport, tonic::Code::Unavailable, why));
    loop {
        let message = match tokio::time::timeout(open.silence_max, open.messages.message()).await {
            Ok(Ok(Some(response))) => response.message,
            Ok(Ok(None)) => return broken("the claim stream ended"),
            Ok(Err(status)) => {
                let error = Error::from(status);
                tracing::debug!(%error, "the claim stream broke; connecting again");
                return End::Broke(error);
            }
            Err(_) => {
                tracing::debug!("the claim stream has gone silent; connecting again");
                return broken("the claim stream has gone silent");
            }
        };
        match message {
            Some(Message::Task(wire)) => match ClaimedTask::new(&inside.client, wire, Some(inside.id)) {
                Ok(task) => {
                    inside.arrived.notify_one();
                    // A closed stream's tasks are given back by whoever closes it.
                    let _ = tell.send(task);
                }
                Err(error) => tracing::warn!(%error, "a task could not be read; its lease will run out"),
            },
            Some(Message::Revoked(revoked)) => {
                if let Ok(run_id) = wire::id(&revoked.run_id) {
                    inside.judge(run_id, &revoked.claim_token, revoked.verdict);
                }
            }
            Some(Message::Ending(ending)) if ending.reason() == pb::EndReason::Drained => {
                inside.closing.send_replace(true);
                return End::Told(Duration::ZERO);
            }
            Some(Message::Ending(ending)) => {
                let jitter = Duration::from_millis(50).mul_f64(1.0 + random());
                return End::Told(wire::span(ending.reconnect_after.as_ref()).unwrap_or_default() + jitter);
            }
            Some(Message::Heartbeat(_) | Message::Opened(_)) | None => {}
        }
    }
}

/// Keeps the leases of all tasks that are worked on, in one call for all. A new task is extended soon, which shows the
/// server that it has arrived; one that is settled by then costs nothing.
async fn keep(inside: Arc<Inside>) {
    let soon = inside.options.start_deadline().map(|deadline| deadline / 3);
    let mut due = Instant::now() + *inside.extend_every.borrow();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(due) => {}
            () = inside.arrived.notified(), if soon.is_some() => {
                due = due.min(Instant::now() + soon.unwrap_or_default());
                continue;
            }
        }
        due = Instant::now() + *inside.extend_every.borrow();
        let held = inside.client.shared.registry.kept_by(inside.id);
        // At once: a call that hangs takes no other call's time.
        join_all(held.chunks(EXTEND_MAX).map(|held| extend(&inside, held))).await;
    }
}

async fn extend(inside: &Inside, held: &[(Uuid, String)]) {
    let claims = held
        .iter()
        .map(|(run_id, token)| pb::ClaimRef { run_id: run_id.to_string(), claim_token: Some(token.clone()) })
        .collect();
    let request = pb::ExtendClaimsRequest { queue: inside.client.queue_name().to_owned(), claims, extend_by: None };
    let limit = (*inside.extend_every.borrow()).max(Duration::from_millis(500));
    let sent = inside.client.call(request, limit, |mut grpc, request| async move { grpc.extend_claims(request).await });
    match sent.await {
        Ok(response) => {
            for ((run_id, token), verdict) in held.iter().zip(response.verdicts) {
                inside.judge(*run_id, token, verdict.verdict);
            }
        }
        Err(error) => tracing::warn!(%error, claims = held.len(), "could not extend the leases; trying again"),
    }
}
