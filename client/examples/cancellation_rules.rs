//! Cancellation rules: tasks that are cancelled by themselves. `cargo run -p absurd-client --example cancellation_rules`

#![expect(clippy::disallowed_methods, reason = "a synchronous program: nothing else runs on this thread")]

use std::time::Duration;

use absurd_client::blocking::{AbsurdClient, spawn_cancellable_task};
use absurd_client::{CancellationRules, ClaimOptions, SpawnOptions};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("cancellable_queue"), None)?;
    client.create_queue()?;
    // With the helper: when nobody claims it within an hour, or when it takes longer than two.
    let rules =
        CancellationRules { max_delay: Some(Duration::from_secs(3600)), max_duration: Some(Duration::from_secs(7200)) };
    let patient = spawn_cancellable_task(&client, "potentially_long_task", &json!({"data": "value"}), rules)?;
    if let Some(stored) = client.get_task_status(patient.task_id)?.and_then(|task| task.cancellation) {
        println!("stored: {stored}");
    }
    client.cancel_task(patient.run_id)?;

    // Or directly: this one is over a second after its first claim.
    let options = SpawnOptions::default().max_duration(Duration::from_secs(1));
    client.spawn_task("another_long_task", &json!({"data": "value"}), options)?;
    for task in client.claim_task(ClaimOptions::default())? {
        // The server sees to it, and says so to whoever speaks of the run next.
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
