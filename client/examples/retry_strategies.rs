//! Retry strategies: when a failed task gets its next attempt. `cargo run -p absurd-client --example retry_strategies`

use std::time::{Duration, SystemTime};

use absurd_client::blocking::{AbsurdClient, spawn_retry_task};
use absurd_client::{ClaimOptions, Retries, RetryStrategy, SpawnOptions};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("retry_queue"), None)?;
    client.create_queue()?;
    // With the helper: delays of 10 s, 20 s, 40 s and 80 s, at most one hour.
    let strategy =
        RetryStrategy::Exponential { base: Duration::from_secs(10), factor: 2.0, max: Some(Duration::from_secs(3600)) };
    spawn_retry_task(&client, "unreliable_task", &json!({}), Retries { max_attempts: 5, strategy })?;
    // With spawn options: one minute between three attempts.
    let fixed = SpawnOptions::default().max_attempts(3).retry(RetryStrategy::Fixed(Duration::from_secs(60)));
    client.spawn_task("another_unreliable_task", &json!({}), fixed)?;
    // Without either: the default is one attempt.
    client.spawn_task("hopeless_task", &json!({}), SpawnOptions::default())?;

    for task in client.claim_task(ClaimOptions::default().qty(3))? {
        let outcome = client.fail_task(task.run_id, "random failure for demonstration", None)?;
        match outcome.next {
            Some(next) => {
                let wait =
                    next.available_at.and_then(|at| at.duration_since(SystemTime::now()).ok()).unwrap_or_default();
                println!("{}: attempt {} follows in {} s", task.task_name, next.attempt, wait.as_secs_f64().round());
            }
            None => println!("{}: given up", task.task_name),
        }
    }
    Ok(())
}
