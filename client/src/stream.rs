//! A claim stream that reconnects until it is closed or drained. It shows the tokens of held claims when it reconnects,
//! and extends their leases.

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

/// Maximum number of claims in one `ExtendClaims` call.
const EXTEND_MAX: usize = 1000;
/// Longest time for the `DrainWorker` call that announces the end of a stream.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// A stream that was open for longer resets the pause before it is opened again; one that breaks sooner lengthens it.
const STEADY: Duration = Duration::from_secs(10);
/// Longest wait for the first message of a stream.
const OPEN_MAX: Duration = Duration::from_secs(15);

/// Options of a stream. The server decides; its first message holds the values in force.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// Maximum number of tasks in flight, 1 to 10,000.
    pub max_in_flight: i32,
    /// Lease of each claim, in whole seconds from 1 s to 24 h. The stream extends it while the task is worked on.
    pub claim_timeout: Duration,
    /// A task that reached no worker is given back after this long, or when its lease ends if that comes first.
    pub start_deadline: Option<Duration>,
    /// If this process is lost, the server cuts the leases of its tasks to this, 1 s to 10 min. `None` means that it
    /// cuts none.
    pub reconnect_grace: Option<Duration>,
    /// Receives only tasks of these names, at most 100; empty means all.
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
    /// At most the lease: the server refuses a longer deadline, which could have no effect.
    fn start_deadline(&self) -> Option<Duration> {
        self.start_deadline.map(|deadline| deadline.min(self.claim_timeout))
    }
}

/// The tasks of a stream, in the order of their arrival. Dropping it ends the stream at once; [`ClaimStream::close`]
/// drains it first.
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
    /// Number of this stream among the client's streams.
    id: u64,
    /// True once the stream is to end.
    closing: watch::Sender<bool>,
    /// Interval of lease extensions: a third of the lease until the server sends another value.
    extend_every: watch::Sender<Duration>,
    /// Notified for each new task, whose arrival the server must learn of soon.
    arrived: Notify,
    /// The error of the last attempt to open the stream again, while it is not open.
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

    /// The next task. `None` means that the stream was drained by `DrainWorker` and receives no more tasks.
    pub async fn next(&mut self) -> Option<ClaimedTask> {
        self.tasks.recv().await
    }

    /// The error of the last attempt to open the stream again; `None` while the stream is open. A stream that a replica
    /// ended politely, and that opens elsewhere at once, shows no error.
    pub fn trouble(&self) -> watch::Receiver<Option<Error>> {
        self.inside.trouble.subscribe()
    }

    /// Ends the stream: no more tasks arrive, and tasks not yet taken go back without using up an attempt. Leases of
    /// tasks that are still worked on are extended until the tasks are settled, or until `limit` has passed.
    pub async fn close(mut self, limit: Duration) -> Result<(), Error> {
        let until = Instant::now() + limit;
        // Tells the server that this end is planned: it then neither cuts leases nor treats the worker as lost.
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

    /// Opens the stream and reads its first message, within `limit`.
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
        // The verdicts come in the order of the request.
        for ((run_id, token), verdict) in held.iter().zip(&opened.held) {
            self.judge(*run_id, token, verdict.verdict);
        }
        let heartbeat = wire::span(opened.heartbeat_interval.as_ref()).unwrap_or(Duration::from_secs(15));
        Ok(Connected { messages, silence_max: heartbeat * 3 })
    }

    /// Applies the server's verdict on a claim to the registry.
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

/// Reads and reconnects until the stream is to end. It always drains the transport: the stream's credit bounds the
/// tasks that wait for a slow consumer.
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

/// Outcome of one connection of the stream.
enum End {
    /// Ended by the server's announcement, which names the pause before the next connection.
    Told(Duration),
    /// Broke with this error.
    Broke(Error),
}

/// Reads one connection until it ends.
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
                    // If the stream is closed, `close` gives its tasks back.
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

/// Extends the leases of all tasks that are worked on, up to 1,000 in one call. A new task is extended soon, so that
/// the server learns of its arrival; a task that is settled before that costs no call.
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
        // All at once: one call that gets no answer delays no other.
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
