//! Long tasks: a claim is a lease, and a worker that needs more time extends it.
//! `cargo run -p absurd-client --example long_running`

#![expect(clippy::disallowed_methods, reason = "a synchronous program: nothing else runs on this thread")]

use std::time::Duration;

use absurd_client::blocking::{AbsurdClient, ClaimedTask};
use absurd_client::{ClaimOptions, Error, SpawnOptions, StreamOptions};
use serde_json::json;

const CHUNKS: u32 = 10;
const LEASE: Duration = Duration::from_secs(2);

fn long_processing_task(client: &AbsurdClient, task: &ClaimedTask) -> Result<(), Error> {
    for chunk in 1..=CHUNKS {
        std::thread::sleep(Duration::from_millis(300)); // The work.
        client.extend_claim(task.run_id, LEASE)?;
        client.set_checkpoint(task.task_id, "progress", &json!({"step": chunk, "total": CHUNKS}), task.run_id, None)?;
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("long_task_queue"), None)?;
    client.create_queue()?;
    client.spawn_task("long_processing", &json!({}), SpawnOptions::default())?;
    for task in client.claim_task(ClaimOptions::default().claim_timeout(LEASE))? {
        long_processing_task(&client, &task)?;
        client.complete_task(task.run_id, &json!({"status": "completed", "steps": CHUNKS}))?;
        println!("completed after {CHUNKS} extensions, attempt {}", task.attempt);
    }

    // Tasks from a stream need no such calls: the stream extends the leases of all tasks that it delivered.
    client.spawn_task("long_processing", &json!({}), SpawnOptions::default())?;
    let mut tasks = client.claim_stream(StreamOptions { claim_timeout: LEASE, ..StreamOptions::default() })?;
    if let Some(task) = tasks.next()? {
        std::thread::sleep(LEASE * 3 / 2); // The work.
        task.complete(&json!({"status": "completed"}))?;
        println!("completed after one and a half leases, attempt {}", task.attempt);
    }
    tasks.close(Duration::from_secs(5))?;
    Ok(())
}
