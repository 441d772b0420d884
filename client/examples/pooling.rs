//! Pooling: a program needs no pool. A client is cheap to clone, its clones share one connection to each replica, and a
//! connection carries any number of calls at once. `cargo run -p absurd-client --example pooling`

use std::time::Duration;

use absurd_client::{AbsurdClient, ClaimOptions, Reason, SpawnOptions, get_absurd_client};
use serde_json::json;

async fn process(client: &AbsurdClient) -> anyhow::Result<usize> {
    let claimed = client.claim_task(ClaimOptions::default().qty(5).wait(Duration::from_secs(10))).await?;
    for task in &claimed {
        client.complete_task(task.run_id, &json!({"processed": task.task_name})).await?;
    }
    Ok(claimed.len())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // One client for the whole process: later calls of this function return it and ignore their arguments.
    let client = get_absurd_client(Some("pooled_queue"), None)?;
    client.create_queue().await?;
    for number in 0..20 {
        client.spawn_task("pooled_task", &json!({"data": number}), SpawnOptions::default()).await?;
    }
    let workers: Vec<_> = (0..4).map(|_| tokio::spawn(process(client))).collect();
    let mut processed = 0;
    for worker in workers {
        processed += worker.await??;
    }
    println!("processed {processed} tasks over one connection");

    // A URL may name several replicas, with commas between; a call goes to one that answers. Failures that may pass are
    // retried until the deadline, so that an error here has lasted that long or is about the request.
    let unknown = client.with_queue("no_such_queue").get_queue_stats().await;
    match unknown {
        Err(error) if error.reason() == Reason::QueueNotFound => println!("as expected: {error}"),
        other => println!("unexpected: {other:?}"),
    }
    Ok(())
}
