//! Operator commands that concern neither a queue nor a task: the server's health, and events.

use absurd_client::Emitted;
use clap::Subcommand;
use serde_json::json;
use tonic_health::pb::health_check_response::ServingStatus;

use super::output::{self, Output, out};
use super::{ClientArgs, input};

/// `absurd event ...`
#[derive(Debug, Subcommand)]
pub(super) enum EventCommand {
    /// Emit an event: runs that wait for it go on
    #[command(after_help = "Examples:\n  absurd event emit shipment.packed:42 '{\"tracking_number\":\"T-1\"}'\n  \
        absurd event emit report:7 @report.json\n  jq -c .order order.json | absurd event emit order:7 -\n  \
        absurd event emit go")]
    Emit {
        /// Name; the first emission of a name wins
        name: String,
        /// Payload: JSON, @FILE, or - for standard input
        #[arg(default_value = "null")]
        payload: String,
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `absurd health`: asks each replica; fails unless all are serving.
pub(super) async fn health(args: ClientArgs) -> anyhow::Result<()> {
    let mut ready = true;
    let mut found = Vec::new();
    let urls = args.urls()?;
    for url in &urls {
        let status = args.health_of(url).await?;
        ready &= status == ServingStatus::Serving;
        match args.output {
            Output::Table if urls.len() > 1 => out!("{url}  {}", status.as_str_name()),
            Output::Table => out!("{}", status.as_str_name()),
            Output::Json => found.push(json!({"url": url, "status": status.as_str_name()})),
        }
    }
    if args.output == Output::Json {
        output::json(&if found.len() == 1 { found.swap_remove(0) } else { found.into() });
    }
    anyhow::ensure!(ready, "the server is not ready: it is stopping, or its database does not answer");
    Ok(())
}

/// `absurd event ...`
pub(super) async fn event(command: EventCommand) -> anyhow::Result<()> {
    let EventCommand::Emit { name, payload, client: args } = command;
    let payload = input::json("payload", &payload)?;
    let client = args.client()?;
    let emit = async { Ok(client.emit_event_json(&name, payload).await?) };
    let Emitted { applied, woken } = args.reach(emit).await?;
    match args.output {
        Output::Json => output::json(&json!({"applied": applied, "woken": woken})),
        Output::Table if applied => out!("emitted; {woken} runs woken"),
        Output::Table => out!("had been emitted before; the first payload stays"),
    }
    Ok(())
}
