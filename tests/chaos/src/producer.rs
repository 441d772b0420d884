//! A producer process of the load: spawns tasks at a rate, twice under one key now and then, emits the events that they
//! wait for, cancels a few. Asks again until it knows how each call ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use absurd_client::{AbsurdClient, ConnectOptions, NewTask, Reason, RetryStrategy, SpawnOptions};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::history::{Call, History, Op, Who};
use crate::shape::{ATTEMPTS_MAX, QUEUE, Shape};

/// Command line of a producer.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub who: Who,
    /// What its choices follow from
    #[arg(long)]
    pub seed: u64,
    /// Tasks per second
    #[arg(long, default_value_t = 100.0)]
    pub rate: f64,
    /// Tasks at most
    #[arg(long, default_value_t = u64::MAX)]
    pub tasks: u64,
    /// Longest time of a step, ms
    #[arg(long, default_value_t = 20)]
    pub work: u64,
    /// Planted bug: a spawn of which nothing is known is made again as another task
    #[arg(long)]
    pub new_id_when_unknown: bool,
}

/// Calls at the same time.
const CALLS_MAX: usize = 500;
/// Tasks that wait for one event.
const WAITERS: u64 = 3;

struct Producer {
    name: String,
    history: History,
    client: AbsurdClient,
    values: AtomicU64,
    new_id_when_unknown: bool,
}

/// Spawns until SIGTERM, then ends what it began.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let deadline = Duration::from_millis(if options.new_id_when_unknown { 500 } else { 10_000 });
    let connect = ConnectOptions { deadline, ..ConnectOptions::new(options.who.urls) };
    let producer = Arc::new(Producer {
        history: History::create(&options.who.history)?,
        client: AbsurdClient::connect(&connect)?.with_queue(QUEUE),
        name: options.who.name,
        values: AtomicU64::new(0),
        new_id_when_unknown: options.new_id_when_unknown,
    });
    let mut random = fastrand::Rng::with_seed(options.seed);
    let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / options.rate));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut calls = JoinSet::new();
    let mut waiting = 0;
    for index in 0..options.tasks {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.recv() => break,
        }
        let event = (random.u32(0..5) == 0).then(|| {
            waiting += 1;
            format!("ev-{}-{}", producer.name, waiting / WAITERS)
        });
        if let Some(event) = event.as_ref().filter(|_| waiting % WAITERS == 0 || waiting == 1) {
            // Two that do not know of each other.
            for _ in 0..2 {
                let after = Duration::from_millis(random.u64(0..4000));
                calls.spawn(Arc::clone(&producer).emit(event.clone(), after));
            }
        }
        let shape = Shape::random(&mut random, format!("{}-{index}", producer.name), event, options.work);
        let keyed = random.u32(0..20) == 0;
        let cancel = (random.u32(0..100) == 0).then(|| Duration::from_millis(random.u64(0..2000)));
        let strategy =
            if random.bool() { RetryStrategy::Immediate } else { RetryStrategy::Fixed(Duration::from_millis(250)) };
        calls.spawn(Arc::clone(&producer).spawn(shape, strategy, keyed, cancel));
        while calls.len() >= CALLS_MAX {
            calls.join_next().await;
        }
    }
    while calls.join_next().await.is_some() {}
    Ok(())
}

impl Producer {
    async fn spawn(self: Arc<Self>, shape: Shape, strategy: RetryStrategy, keyed: bool, cancel: Option<Duration>) {
        let key = keyed.then(|| format!("key-{}", shape.id));
        let one = self.spawn_one(&shape, strategy, key.as_deref());
        let task = if keyed {
            let (one, _) = tokio::join!(one, self.spawn_one(&shape, strategy, key.as_deref()));
            one
        } else {
            one.await
        };
        if let Some(after) = cancel {
            tokio::time::sleep(after).await;
            self.until_known(Op::Cancel, &Call { task: Some(task), ..Call::default() }, || async {
                self.client.cancel_task_by_id(task).await.map(|outcome| (None, Some(outcome.cancelled)))
            })
            .await;
        }
    }

    async fn spawn_one(&self, shape: &Shape, strategy: RetryStrategy, key: Option<&str>) -> Uuid {
        loop {
            let id = Uuid::now_v7();
            let options = SpawnOptions {
                task_id: Some(id),
                idempotency_key: key.map(str::to_owned),
                ..SpawnOptions::default().max_attempts(ATTEMPTS_MAX).retry(strategy)
            };
            let call = Call {
                task: Some(id),
                name: key.map(str::to_owned),
                value: serde_json::to_string(shape).ok(),
                max_attempts: Some(ATTEMPTS_MAX),
                ..Call::default()
            };
            let spawn = || async {
                let task = NewTask::new("chaos", shape, options.clone())?;
                let spawned = self.client.spawn_new_task(task).await?;
                Ok((Some(spawned.task_id.to_string()), Some(spawned.created)))
            };
            if self.new_id_when_unknown {
                let n = self.history.begin(Op::Spawn, call);
                match spawn().await {
                    Ok((value, first)) => {
                        self.history.ok(n, value, first);
                        return id;
                    }
                    Err(error) => self.history.failed(n, &error),
                }
            } else {
                let known = self.until_known(Op::Spawn, &call, spawn).await;
                return known.and_then(|text| text.parse().ok()).unwrap_or(id);
            }
        }
    }

    async fn emit(self: Arc<Self>, event: String, after: Duration) {
        tokio::time::sleep(after).await;
        let value = format!("{}-e{}", self.name, self.values.fetch_add(1, Ordering::Relaxed));
        let call = Call { name: Some(event.clone()), value: Some(value.clone()), ..Call::default() };
        self.until_known(Op::Emit, &call, || async {
            self.client.emit_event(&event, &value).await.map(|emitted| (None, Some(emitted.applied)))
        })
        .await;
    }

    /// Asks until there is an answer; each try is a call of its own in the book.
    async fn until_known<F>(&self, op: Op, call: &Call, ask: impl Fn() -> F) -> Option<String>
    where
        F: Future<Output = Result<(Option<String>, Option<bool>), absurd_client::Error>>,
    {
        loop {
            let n = self.history.begin(op, call.clone());
            match ask().await {
                Ok((value, first)) => {
                    self.history.ok(n, value.clone(), first);
                    return value;
                }
                Err(error) => {
                    self.history.failed(n, &error);
                    let unknown = [Reason::OutcomeUnknown, Reason::DeadlineExceeded];
                    if !error.is_passing() && !unknown.contains(&error.reason()) {
                        eprintln!("{}: {op:?}: {error}", self.name);
                        return None;
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }
}
