//! Checkpoints: a long task that fails half-way continues after its last checkpoint.
//! `cargo run -p absurd-client --example checkpoints`

use std::time::Duration;

use absurd_client::blocking::{AbsurdClient, ClaimedTask};
use absurd_client::{ClaimOptions, SpawnOptions};
use serde_json::{Value, json};

const STEPS: i64 = 5;

fn long_running_task(client: &AbsurdClient, task: &ClaimedTask) -> anyhow::Result<Value> {
    // Progress that an earlier attempt has stored.
    let done = match client.get_checkpoint(task.task_id, "progress", false)?.and_then(|stored| stored.state) {
        Some(state) => state.to::<Value>()?["current_step"].as_i64().unwrap_or(0),
        None => 0,
    };
    println!("attempt {} begins after step {done}", task.attempt);
    for step in done + 1..=STEPS {
        anyhow::ensure!(step != 3 || task.attempt > 1, "the disk is full");
        let state = json!({"current_step": step});
        let extend = Some(Duration::from_secs(60));
        client.set_checkpoint(task.task_id, "progress", &state, task.run_id, extend)?;
    }
    Ok(json!({"status": "completed", "steps": STEPS}))
}

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("long_running_queue"), None)?;
    client.create_queue()?;
    let options = SpawnOptions::default().max_attempts(2);
    let spawned = client.spawn_task("long_running_task", &json!({"work": "complex"}), options)?;
    for _ in 0..2 {
        for task in client.claim_task(ClaimOptions::default().wait(Duration::from_secs(10)))? {
            match long_running_task(&client, &task) {
                Ok(result) => client.complete_task(task.run_id, &result)?,
                Err(error) => {
                    let outcome = client.fail_task(task.run_id, &error.to_string(), None)?;
                    println!("failed: {error}; another attempt follows: {}", outcome.next.is_some());
                }
            }
        }
    }
    println!("the task is {}", client.get_task_result(spawned.task_id)?.state);
    Ok(())
}
