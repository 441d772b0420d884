//! Basic processing: spawn a task, claim it, complete or fail it.
//! `cargo run -p absurd-client --example basic_processing`

use absurd_client::blocking::AbsurdClient;
use absurd_client::{ClaimOptions, SpawnOptions};
use serde_json::{Value, json};

fn process_task(name: &str, params: &Value) -> Result<Value, String> {
    match name {
        "echo" => Ok(json!({"output": format!("Processed: {}", params["message"].as_str().unwrap_or_default())})),
        other => Err(format!("nobody knows how to do {other}")),
    }
}

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("default_queue"), None)?;
    client.create_queue()?;
    for name in ["echo", "sing"] {
        let spawned = client.spawn_task(name, &json!({"message": "Hello, World!"}), SpawnOptions::default())?;
        println!("spawned {name}: task {}, run {}", spawned.task_id, spawned.run_id);
    }
    for task in client.claim_task(ClaimOptions::default().qty(2))? {
        match process_task(&task.task_name, &task.params()?) {
            Ok(result) => {
                client.complete_task(task.run_id, &result)?;
                println!("completed {}: {result}", task.task_name);
            }
            Err(reason) => {
                client.fail_task(task.run_id, &reason, None)?;
                println!("failed {}: {reason}", task.task_name);
            }
        }
    }
    Ok(())
}
