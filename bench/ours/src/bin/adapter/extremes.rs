//! Extreme loads: a task with many checkpoints, payloads of 1 MiB, an event with many waits, a long queue.

use std::time::Instant;

use absurd_client::{AbsurdClient, Awaited, ClaimOptions, ClaimedTask, NewTask, SpawnOptions};
use anyhow::Context as _;
use serde_json::json;
use tokio::task::JoinSet;

use super::say;

const CHECKPOINTS: usize = 10_000;
const WAITERS: usize = 50_000;

fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e4).round() / 10.0
}

async fn claim(client: &AbsurdClient, qty: i32) -> anyhow::Result<Vec<ClaimedTask>> {
    Ok(client
        .claim_task(ClaimOptions { qty, claim_timeout: std::time::Duration::from_secs(600), ..ClaimOptions::default() })
        .await?)
}

/// Claims and completes 200 tasks one by one, and then at least `count` tasks in batches of 100.
pub(super) async fn take(client: &AbsurdClient, count: u64) -> anyhow::Result<()> {
    client.create_queue().await?;
    say("ready")?;
    let mut single = Vec::new();
    for _ in 0..200 {
        let began = Instant::now();
        let task = claim(client, 1).await?.pop().context("nothing to claim")?;
        single.push(ms(began));
        task.complete(&json!({"ok": true})).await?;
    }
    single.sort_by(f64::total_cmp);
    let (began, mut taken) = (Instant::now(), 0);
    while taken < count {
        let mut completing: JoinSet<Result<(), absurd_client::Error>> = JoinSet::new();
        for task in claim(client, 100).await? {
            taken += 1;
            completing.spawn(async move { task.complete(&json!({"ok": true})).await });
        }
        while let Some(done) = completing.join_next().await {
            done??;
        }
    }
    let micros = began.elapsed().as_secs_f64() * 1e6 / f64::from(u32::try_from(taken)?);
    let found = json!({"claim_p50_ms": single[100], "claim_p99_ms": single[198], "us_per_task": micros.round()});
    say(&format!("result {found}"))
}

async fn checkpoints(client: &AbsurdClient) -> anyhow::Result<(f64, f64)> {
    let spawned = client.spawn_task("many", &json!({}), SpawnOptions::default()).await?;
    let task = claim(client, 1).await?.pop().context("nothing to claim")?;
    let began = Instant::now();
    for part in 0..CHECKPOINTS / 500 {
        let mut writing: JoinSet<Result<bool, absurd_client::Error>> = JoinSet::new();
        for number in 0..500 {
            let (client, run_id) = (client.clone(), task.run_id);
            let name = format!("step {}", part * 500 + number);
            let save = async move { client.save_checkpoint_for_run(run_id, &name, &json!({"i": number}), None).await };
            writing.spawn(save);
        }
        while let Some(done) = writing.join_next().await {
            done??;
        }
    }
    let wrote = ms(began);
    let began = Instant::now();
    let read = client.get_all_checkpoints(spawned.task_id, task.run_id).await?.len();
    anyhow::ensure!(read == CHECKPOINTS, "{read} checkpoints were read");
    let took = ms(began);
    task.complete(&json!({})).await?;
    Ok((wrote, took))
}

/// Median milliseconds from spawn to completion of tasks with 1 MiB of params and of result.
async fn payloads(client: &AbsurdClient) -> anyhow::Result<f64> {
    let large = json!("x".repeat((1 << 20) - 2));
    let mut times = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        client.spawn_task("large", &large, SpawnOptions::default()).await?;
        let task = claim(client, 1).await?.pop().context("nothing to claim")?;
        task.complete(&large).await?;
        times.push(ms(began));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[25])
}

/// Milliseconds until all runs wait, and until all are woken.
async fn waiters(client: &AbsurdClient) -> anyhow::Result<(f64, f64)> {
    let new = |_| NewTask::new("waits", &json!({}), SpawnOptions::default());
    for _ in 0..WAITERS / 500 {
        client.spawn_tasks((0..500).map(new).collect::<Result<_, _>>()?).await?;
    }
    let began = Instant::now();
    let mut waiting = 0;
    while waiting < WAITERS {
        let mut waits: JoinSet<Result<Awaited, absurd_client::Error>> = JoinSet::new();
        for task in claim(client, 500).await? {
            waiting += 1;
            waits.spawn(async move { task.await_event("s", "all", None).await });
        }
        while let Some(done) = waits.join_next().await {
            done??;
        }
    }
    let stood = ms(began);
    let began = Instant::now();
    let emitted = client.emit_event("all", &json!({"go": true})).await?;
    anyhow::ensure!(emitted.woken == i64::try_from(WAITERS)?, "{} were woken", emitted.woken);
    Ok((stood, ms(began)))
}

pub(super) async fn run(client: &AbsurdClient) -> anyhow::Result<()> {
    client.create_queue().await?;
    say("ready")?;
    let (wrote, read) = checkpoints(client).await?;
    let payload = payloads(client).await?;
    let (stood, woke) = waiters(client).await?;
    let found = json!({
        "10000_checkpoints_written_ms": wrote, "10000_checkpoints_read_ms": read,
        "1_mib_in_and_out_p50_ms": payload, "50000_waits_ms": stood, "50000_woken_ms": woke,
    });
    say(&format!("result {found}"))
}
