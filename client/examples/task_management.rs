//! Task management: read a task and its run, schedule the run, cancel the task.
//! `cargo run -p absurd-client --example task_management`

use std::time::{Duration, SystemTime};

use absurd_client::blocking::AbsurdClient;
use absurd_client::{ClaimOptions, SpawnOptions};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("task_queue"), None)?;
    client.create_queue()?;
    let params = json!({"data": "value", "options": {"verbose": true}});
    let spawned = client.spawn_task("complex_task", &params, SpawnOptions::default())?;

    if let Some(task) = client.get_task_status(spawned.task_id)? {
        println!("the task is {} with {}", task.state, task.params);
    }
    if let Some(run) = client.get_run_status(spawned.run_id)? {
        println!("its run is {}, attempt {}", run.state, run.attempt);
    }

    client.schedule_task(spawned.run_id, SystemTime::now() + Duration::from_secs(600))?;
    println!("claimable before its time: {}", client.claim_task(ClaimOptions::default())?.len());

    // By run: only if it is pending or sleeping, as here. By task: any task that has not ended.
    let outcome = client.cancel_task(spawned.run_id)?;
    println!("cancelled: {}, the task is {}", outcome.cancelled, outcome.state);
    let again = client.cancel_task_by_id(spawned.task_id)?;
    println!("cancelled again: {}", again.cancelled);
    Ok(())
}
