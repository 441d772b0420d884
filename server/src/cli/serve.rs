//! `absurd serve` and `absurd migrate`.

use crate::app::App;
use crate::cli::{MigrateArgs, ServeArgs, asked_to_stop, block_on, log};
use crate::settings::{Settings, parse_database};
use crate::store::migrate::{self, Origin, Report};

/// Serves until asked to stop.
pub(super) fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let file = args.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
    let settings = args.settings.or(file);
    log(settings.log.as_deref().unwrap_or("info"), settings.log_json.unwrap_or(false))?;
    let options = settings.into_app_options()?;
    block_on(async move {
        let app = App::start(options).await?;
        if let Some(report) = app.migrated() {
            tracing::info!(applied = ?report.applied, doorbell = report.doorbell, "the database is up to date");
        }
        tracing::info!(listen = %app.addr(), "serving");
        asked_to_stop().await;
        tracing::info!("stopping: streams end, claims that reached nobody go back");
        app.shut_down().await?;
        tracing::info!("stopped");
        Ok(())
    })
}

/// Migrates and says what was done.
pub(super) fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    let database = parse_database(&args.database_url)?;
    let options = migrate::Options { doorbell: args.doorbell, no_doorbell: args.no_doorbell };
    let report = block_on_report(migrate::migrate(&database, options))?;
    println!("{}", describe(&report));
    Ok(())
}

fn block_on_report(work: impl Future<Output = Result<Report, crate::domain::Error>>) -> anyhow::Result<Report> {
    Ok(super::runtime()?.block_on(work)?)
}

fn describe(report: &Report) -> String {
    let origin = match report.origin {
        Origin::Ours => "the storage contract was installed by this program",
        Origin::Adopted => "schema absurd was installed by upstream's tool and stays as it is",
    };
    let applied = if report.applied.is_empty() {
        "nothing to do".to_owned()
    } else {
        format!("applied: {}", report.applied.join(", "))
    };
    let doorbell = if report.doorbell { "on" } else { "off (tasks from SQL are found within two seconds)" };
    format!("{applied}\norigin:   {origin}\ndoorbell: {doorbell}")
}
