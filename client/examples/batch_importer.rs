//! An import of many rows in batches. Each batch is a step whose value is the progress so far: any client can read it,
//! and a crash costs one batch. `cargo run -p absurd-client --example batch_importer`

use absurd_client::durable::{Absurd, BoxError, Context, TaskOptions, WorkerOptions};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Import {
    rows: u64,
    batch: u64,
}

/// Value of each step: the progress so far.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Progress {
    rows_done: u64,
    sum: u64,
}

async fn import(ctx: Context, import: Import) -> Result<Progress, BoxError> {
    let mut progress = Progress::default();
    while progress.rows_done < import.rows {
        let next = import.rows.min(progress.rows_done + import.batch);
        // Stored batches return their values; the first batch that is not stored is loaded.
        progress = ctx.step("batch", async || load(progress, next).await).await?;
        if progress.rows_done == 600 && ctx.attempt() == 1 {
            return Err("the disk is full".into());
        }
    }
    Ok(progress)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let absurd = Absurd::connect()?;
    absurd.client().create_queue().await?;
    let options = TaskOptions { default_max_attempts: Some(3), ..TaskOptions::default() };
    let kind = absurd.register_with("import", options, import);
    let worker = absurd.start_worker(WorkerOptions::default()).await?;
    let spawned = absurd.spawn(&kind, &Import { rows: 1000, batch: 200 }).await?;
    let end = absurd.await_task_result(&kind, spawned.task_id, None).await?;
    let total: Progress = end.result.ok_or("it failed")?.to()?;
    println!("{} rows, sum {}", total.rows_done, total.sum);

    // Any client can read the progress, at any time.
    let task = absurd.client().get_task_status(spawned.task_id).await?.ok_or("it is gone")?;
    let run = task.last_attempt_run.ok_or("it has no run")?;
    for stored in absurd.client().get_all_checkpoints(spawned.task_id, run).await? {
        let progress: Progress = stored.state.ok_or("it is empty")?.to()?;
        println!("{}: {} rows", stored.checkpoint_name, progress.rows_done);
    }
    worker.stop().await;
    Ok(())
}

async fn load(from: Progress, to: u64) -> Result<Progress, BoxError> {
    println!("loading rows {} to {to}", from.rows_done);
    Ok(Progress { rows_done: to, sum: from.sum + (from.rows_done..to).sum::<u64>() })
}
