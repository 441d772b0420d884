//! A worker in Rust: fulfils orders as they are pushed. `cargo run -p absurd-client --example worker`

use absurd_client::{AbsurdClient, ConnectOptions, StreamOptions};
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::connect(&ConnectOptions::from_env())?;
    let mut tasks = client.claim_stream(StreamOptions { max_in_flight: 4, ..StreamOptions::default() }).await?;
    println!("rust worker: ready");
    while let Some(task) = tasks.next().await {
        // Each task has a Tokio task of its own. The stream extends the leases, and outcomes are sent in batches.
        tokio::spawn(async move {
            let outcome = match task.params::<Value>().map_err(|error| error.to_string()).and_then(fulfil) {
                Ok(result) => task.complete(&result).await,
                Err(message) => task.fail(&json!({"name": "OrderError", "message": message})).await.map(drop),
            };
            match outcome {
                Ok(()) => println!("rust worker: completed {}", task.task_id),
                Err(error) => eprintln!("rust worker: {} could not be reported: {error}", task.task_id),
            }
        });
    }
    Ok(())
}

fn fulfil(order: Value) -> Result<Value, String> {
    let order_id = order["order_id"].as_str().ok_or("the order has no order_id")?;
    Ok(json!({"order_id": order_id, "tracking_number": format!("TRACK-{order_id}"), "by": "rust"}))
}
