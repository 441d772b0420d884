//! Events: a task waits for one and continues when it is emitted. The worker is free meanwhile.
//! `cargo run -p absurd-client --example events`

use std::time::Duration;

use absurd_client::blocking::{AbsurdClient, ClaimedTask};
use absurd_client::{ClaimOptions, Json, SpawnOptions, WaitError};
use serde_json::json;

const HOUR: Duration = Duration::from_secs(3600);

/// The task. It runs from its beginning each time; the wait is a step, which returns the payload once the event was
/// emitted.
fn receive(client: &AbsurdClient, task: &ClaimedTask) -> Result<Json, WaitError> {
    client.wait_for_event(task.run_id, "data_ready", HOUR, Some(task.task_id), "waiting_step")
}

/// One execution of the task: completes or fails the run, unless the run sleeps.
fn process(client: &AbsurdClient, task: &ClaimedTask) -> anyhow::Result<()> {
    match receive(client, task) {
        Ok(payload) => {
            println!("received {payload}");
            client.complete_task(task.run_id, &json!({"status": "received"}))?;
        }
        // The run sleeps already: free the worker, and neither complete nor fail the run.
        Err(WaitError::Sleep(sleep)) => println!("{sleep}"),
        Err(WaitError::Timeout) => {
            client.fail_task(task.run_id, "data_ready did not come within an hour", None)?;
        }
        Err(WaitError::Call(error)) => return Err(error.into()),
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("event_queue"), None)?;
    client.create_queue()?;
    let spawned = client.spawn_task("receive", &json!({}), SpawnOptions::default())?;
    for task in client.claim_task(ClaimOptions::default())? {
        process(&client, &task)?;
    }

    let emitted = client.emit_event("data_ready", &json!({"processed_data": "some_value"}))?;
    println!("emitted; {} run woken", emitted.woken);

    for task in client.claim_task(ClaimOptions::default().wait(Duration::from_secs(10)))? {
        process(&client, &task)?;
    }
    println!("the task is {}", client.get_task_result(spawned.task_id)?.state);
    Ok(())
}
