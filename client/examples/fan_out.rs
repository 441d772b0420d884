//! Fan-out: a parent spawns 1,000 children and waits for all of them. It holds no slot of the worker meanwhile, so that
//! one slot is enough. `cargo run --release -p absurd-client --example fan_out`

use absurd_client::durable::{Absurd, BoxError, Context, TaskType, WorkerOptions};

const SQUARE: TaskType<u64, u64> = TaskType::new("square");

async fn sum_of_squares(ctx: Context, count: u64) -> Result<u64, BoxError> {
    // Spawned once, however often the parent starts again: a replay gets the same ids.
    let children = ctx.spawn_all(&SQUARE, 1..=count).await?;
    let mut sum = 0;
    for child in children {
        sum += ctx.await_task_result(&SQUARE, child).await?;
    }
    Ok(sum)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let absurd = Absurd::connect()?;
    absurd.client().create_queue().await?;
    absurd.register(SQUARE, |_: Context, number: u64| async move { Ok::<_, BoxError>(number * number) });
    let sum = absurd.register("sum-of-squares", sum_of_squares);
    let worker = absurd.start_worker(WorkerOptions::default().prefetch(50)).await?;
    let spawned = absurd.spawn(&sum, &1000).await?;
    let end = absurd.await_task_result(&sum, spawned.task_id, None).await?;
    println!("the sum of 1000 squares is {}", end.result.ok_or("it failed")?);
    let stats = absurd.client().get_queue_stats().await?;
    println!("{} tasks completed on one place", stats.completed);
    worker.stop().await;
    Ok(())
}
