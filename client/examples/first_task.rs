//! A first task: spawned, pushed, completed. `cargo run -p absurd-client --example first_task`

use std::time::Duration;

use absurd_client::{AbsurdClient, ConnectOptions, SpawnOptions, StreamOptions};
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::connect(&ConnectOptions::from_env())?.with_queue("first");
    client.create_queue().await?;
    let spawned = client.spawn_task("greet", &json!({"name": "world"}), SpawnOptions::default()).await?;

    let mut tasks = client.claim_stream(StreamOptions::default()).await?;
    if let Some(task) = tasks.next().await {
        let params: Value = task.params()?;
        let name = params["name"].as_str().unwrap_or("nobody");
        task.complete(&json!({"greeting": format!("hello {name}")})).await?;
    }

    let end = client.await_task_result(spawned.task_id, Some(Duration::from_secs(10))).await?;
    println!("{}: {}", end.state, end.result.map(|result| result.to_string()).unwrap_or_default());
    tasks.close(Duration::from_secs(5)).await?;
    Ok(())
}
