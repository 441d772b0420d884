//! A recurring task: each round sleeps until its time, does its work and spawns the next round. The idempotency key of
//! the next round is its time, so that neither a crash nor a second scheduler makes two tasks of it.
//! `cargo run -p absurd-client --example cron`

use std::time::{Duration, SystemTime};

use absurd_client::durable::{Absurd, BoxError, Context, TaskType, WorkerOptions};
use serde::{Deserialize, Serialize};

const REPORT: TaskType<Round, ()> = TaskType::new("report");

/// Params of one round.
#[derive(Serialize, Deserialize)]
struct Round {
    at: SystemTime,
    every: Duration,
    /// Number of rounds that follow; a real schedule would not end.
    left: u32,
}

impl Round {
    fn key(&self) -> String {
        format!("report:{}", self.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros())
    }
}

async fn report(ctx: Context, round: Round) -> Result<(), BoxError> {
    ctx.sleep_until("until its time", round.at).await?;
    ctx.step("report", async || write_report(round.left).await).await?;
    if round.left > 0 {
        // The next time follows from the schedule and not from the end of the work: rounds do not drift.
        let next = Round { at: round.at + round.every, left: round.left - 1, ..round };
        ctx.spawn(&REPORT, &next).options(|draft| draft.idempotency_key(next.key())).await?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let absurd = Absurd::connect()?;
    absurd.client().create_queue().await?;
    absurd.register(REPORT, report);
    let first = Round { at: SystemTime::now(), every: Duration::from_millis(500), left: 2 };
    let spawned = absurd.spawn(&REPORT, &first).idempotency_key(first.key()).await?;
    let again = absurd.spawn(&REPORT, &first).idempotency_key(first.key()).await?;
    println!("a second scheduler spawns the same task: {}", spawned.task_id == again.task_id);
    let worker = absurd.start_worker(WorkerOptions::default()).await?;
    // Finds the task of each round by its key: a spawn with a known key returns the existing task.
    let mut round = first;
    loop {
        let known = absurd.spawn(&REPORT, &round).idempotency_key(round.key()).await?;
        absurd.await_task_result(&REPORT, known.task_id, None).await?;
        if round.left == 0 {
            break;
        }
        round = Round { at: round.at + round.every, left: round.left - 1, ..round };
    }
    worker.stop().await;
    Ok(())
}

async fn write_report(left: u32) -> Result<(), BoxError> {
    println!("report; {left} to come");
    Ok(())
}
