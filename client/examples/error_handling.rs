//! Errors: each has a reason by which a program decides. `cargo run -p absurd-client --example error_handling`

use std::time::Duration;

use absurd_client::blocking::AbsurdClient;
use absurd_client::{ClaimOptions, Error, Reason, SpawnOptions, WaitError};
use serde_json::json;

/// Reaction of a worker to a failed call.
fn what_now(error: &Error) -> &'static str {
    match error.reason() {
        Reason::TaskCancelled => "the task was cancelled: stop, report nothing",
        _ if error.is_claim_over() => "the run is not ours any more: stop, report nothing",
        _ if error.is_passing() => "the client has tried until its deadline: try again later",
        Reason::InvalidArgument | Reason::JsonInvalid | Reason::PayloadTooLarge => "our own mistake: mend the call",
        _ => "tell somebody",
    }
}

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("error_handling_queue"), None)?;
    client.create_queue()?;

    // A run that goes to sleep has not failed.
    client.spawn_task("waits", &json!({}), SpawnOptions::default())?;
    for task in client.claim_task(ClaimOptions::default())? {
        let waited = client.wait_for_event(
            task.run_id,
            "data_ready",
            Duration::from_secs(3600),
            Some(task.task_id),
            "waiting_step",
        );
        if let Err(WaitError::Sleep(sleep)) = waited {
            println!("run sleeps: {}, waiting for {:?}", sleep.run_id == Some(task.run_id), sleep.event_name);
            client.set_run_sleeping(task.run_id, "data_ready")?; // As the original's orchestrators do; no effect.
        }
        client.cancel_task(task.run_id)?;
    }

    // A task that is cancelled while a worker runs it.
    client.spawn_task("cancelled", &json!({}), SpawnOptions::default())?;
    for task in client.claim_task(ClaimOptions::default())? {
        client.cancel_task_by_id(task.task_id)?;
        if let Err(error) = client.complete_task(task.run_id, &json!({"too": "late"})) {
            println!("{}: {}", error.reason().as_str(), what_now(&error));
        }
    }

    // The error of an invalid call names the wrong field.
    let wrong = client.spawn_task("", &json!({}), SpawnOptions::default());
    if let Err(error) = wrong {
        println!("{} in {:?}: {}", error.reason().as_str(), error.field(), what_now(&error));
    }
    let unknown = client.complete_task("00000000-0000-7000-8000-000000000000".parse()?, &());
    if let Err(error) = unknown {
        println!("{}: {}", error.reason().as_str(), what_now(&error));
    }
    Ok(())
}
