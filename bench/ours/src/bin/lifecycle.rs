//! The whole life of tasks through the store alone, without transport, dispatch and group commit: tasks are spawned,
//! claimed and completed in batches. `absurd-lifecycle DATABASE_URL CALLERS BATCH SECONDS` prints completed tasks per
//! second.

#![allow(clippy::print_stdout, reason = "the orchestrator reads it")]

use std::time::{Duration, Instant};

use absurd_server::domain::claim::Secret;
use absurd_server::domain::json::JsonBound;
use absurd_server::domain::{JsonText, QueueName, TaskName, WorkerId};
use absurd_server::jitter::random;
use absurd_server::scope::{Caller, Scope};
use absurd_server::store::batch::{Answer, RunRef, Write};
use absurd_server::store::run::{Cursor, Slot};
use absurd_server::store::task::NewTask;
use absurd_server::store::{Fault, Store, StoreOptions};
use tokio::task::JoinSet;

const BOUND: JsonBound = JsonBound { bytes: 1024, depth: 100 };
const PARAMS: &str =
    r#"{"id": 1, "pad": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "t": 0}"#;

fn fail(fault: Fault) -> anyhow::Error {
    anyhow::anyhow!("{fault:?}")
}

async fn spawn(store: &Store, scope: &Scope, batch: usize) -> anyhow::Result<()> {
    let new = || -> anyhow::Result<NewTask> {
        Ok(NewTask {
            task_id: store.mint_id(),
            run_id: store.mint_id(),
            name: TaskName::parse("task_name", "noop")?,
            params: Some(JsonText::parse("params", PARAMS.into(), BOUND)?),
            headers: None,
            retry_strategy: None,
            max_attempts: None,
            cancellation: None,
            idempotency_key: None,
            start: None,
        })
    };
    let tasks: Vec<NewTask> = (0..batch).map(|_| new()).collect::<Result<_, _>>()?;
    let slotted: Vec<_> = tasks.iter().map(|task| (task, None)).collect();
    store.task_spawn(scope, &slotted, Duration::from_secs(1)).await.map_err(fail)?;
    Ok(())
}

/// Claims up to `batch` tasks and completes them. Returns their number.
async fn take(store: &Store, scope: &Scope, batch: usize) -> anyhow::Result<u32> {
    let worker_id = WorkerId::parse("worker_id", "bench")?;
    let slots: Vec<Slot> = (0..batch)
        .map(|_| Ok(Slot { worker_id: worker_id.clone(), secret: Secret::new()?, lease_seconds: 60 }))
        .collect::<anyhow::Result<_>>()?;
    let claimed = store.run_claim(scope, &slots, &[], Cursor::HEAD, &[]).await.map_err(fail)?;
    let refs: Vec<RunRef> = claimed
        .claims
        .iter()
        .map(|(_, claim)| RunRef { run_id: claim.run_id, digest: Some(claim.token.digest()) })
        .collect();
    let complete = Write::Complete { result: Some(JsonText::parse("result", r#"{"ok": true}"#.into(), BOUND)?) };
    // A competing claim may still lock a run; the completion of that run is then repeated.
    let mut open: Vec<&RunRef> = refs.iter().collect();
    while !open.is_empty() {
        let writes: Vec<_> = open.iter().map(|run| (*run, &complete)).collect();
        let answers = store.settle(scope, &writes).await.map_err(fail)?;
        let mut busy = Vec::new();
        for (run, answer) in open.into_iter().zip(answers) {
            match answer {
                Answer::Settled(settled) => {
                    settled?;
                }
                Answer::Busy => busy.push(run),
            }
        }
        open = busy;
    }
    Ok(u32::try_from(refs.len())?)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [url, callers, batch, seconds] = args.as_slice() else {
        anyhow::bail!("usage: absurd-lifecycle DATABASE_URL CALLERS BATCH SECONDS")
    };
    let (callers, batch): (usize, usize) = (callers.parse()?, batch.parse()?);
    let store = Store::new(StoreOptions {
        database: url.parse()?,
        connections_max: callers * 2,
        wait_max: Duration::from_secs(10),
        test_clock: false,
    })?;
    store.clock().await.map_err(fail)?;
    let scope = Caller::anonymous().scope(QueueName::parse("queue", "q")?);
    let started = Instant::now();
    let until = started + Duration::from_secs(seconds.parse()?);
    let mut running: JoinSet<anyhow::Result<u32>> = JoinSet::new();
    for _ in 0..callers {
        let (store, scope) = (store.clone(), scope.clone());
        running.spawn(async move {
            // Staggers the callers, so that they do not act in step.
            tokio::time::sleep(Duration::from_millis(5).mul_f64(random())).await;
            let mut done = 0;
            while Instant::now() < until {
                spawn(&store, &scope, batch).await?;
                done += take(&store, &scope, batch).await?;
            }
            Ok(done)
        });
    }
    let mut done = 0;
    while let Some(count) = running.join_next().await {
        done += count??;
    }
    let rate = f64::from(done) / started.elapsed().as_secs_f64();
    // Completes the tasks that are left because callers also claimed tasks of other callers.
    while take(&store, &scope, 500).await? > 0 {}
    println!("{rate}");
    Ok(())
}
