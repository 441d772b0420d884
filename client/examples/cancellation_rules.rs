//! Cancellation rules: the server cancels tasks that start too late or take too long.
//! `cargo run -p absurd-client --example cancellation_rules`

#![expect(clippy::disallowed_methods, reason = "a synchronous program: nothing else runs on this thread")]

use std::time::Duration;

use absurd_client::blocking::{AbsurdClient, spawn_cancellable_task};
use absurd_client::{CancellationRules, ClaimOptions, SpawnOptions};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("cancellable_queue"), None)?;
    client.create_queue()?;
    // With the helper: cancelled if unclaimed for 1 h, or if not ended 2 h after the first claim.
    let rules =
        CancellationRules { max_delay: Some(Duration::from_secs(3600)), max_duration: Some(Duration::from_secs(7200)) };
    let patient = spawn_cancellable_task(&client, "potentially_long_task", &json!({"data": "value"}), rules)?;
    if let Some(stored) = client.get_task_status(patient.task_id)?.and_then(|task| task.cancellation) {
        println!("stored: {stored}");
    }
    client.cancel_task(patient.run_id)?;

    // With spawn options: cancelled 1 s after the first claim.
    let options = SpawnOptions::default().max_duration(Duration::from_secs(1));
    client.spawn_task("another_long_task", &json!({"data": "value"}), options)?;
    for task in client.claim_task(ClaimOptions::default())? {
        // The server cancels the task, and refuses the next call about its run for that reason.
        let refused = loop {
            std::thread::sleep(Duration::from_millis(200));
            if let Err(error) = client.extend_claim(task.run_id, Duration::from_secs(60)) {
                break error;
            }
        };
        println!("{}: {}", task.task_name, refused.reason().as_str());
        println!("the task is {}", client.get_task_result(task.task_id)?.state);
    }
    Ok(())
}
