//! Validation: queue names are checked before anything is sent. `cargo run -p absurd-client --example validation`

use absurd_client::blocking::AbsurdClient;
use absurd_client::{NewWorkflowRun, Reason};

fn main() -> anyhow::Result<()> {
    for name in ["invalid-queue-name!", "2nd_queue", "valid_queue_name"] {
        match AbsurdClient::new(Some(name), None) {
            Ok(client) => println!("valid: {}", client.queue_name()),
            Err(error) if error.reason() == Reason::InvalidArgument => println!("invalid: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    // Upstream's databases hold queues with other names, which the service accepts; only this constructor has the rule.
    let client = AbsurdClient::new(Some("valid_queue_name"), None)?;
    let permissive = client.with_queue("invalid-queue-name!");
    permissive.create_queue()?;
    println!("created: {}", permissive.queue_name());
    permissive.drop_queue()?;

    if let Err(error) = client.create_workflow_run(NewWorkflowRun::new("data__pipeline", "1.0.0")) {
        println!("invalid {}: {}", error.field().unwrap_or_default(), error.message());
    }
    Ok(())
}
