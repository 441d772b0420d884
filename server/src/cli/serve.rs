//! `absurd serve` and `absurd migrate`.

use crate::app::App;
use crate::cli::{MigrateArgs, ServeArgs, asked_to_stop, block_on, log};
use crate::settings::{Settings, resolve_database};
use crate::store::migrate::{self, Origin, Report};

/// Serves until asked to stop.
pub(super) fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let file = args.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
    let settings = args.settings.or(file);
    log(settings.log.as_deref().unwrap_or("info"), settings.log_json.unwrap_or(false))?;
    let options = settings.into_app_options()?;
    block_on(async move {
        let mut stop = std::pin::pin!(asked_to_stop());
        let app = tokio::select! {
            app = App::start(options) => app?,
            () = &mut stop => return Ok(()),
        };
        if let Some(report) = app.migrated() {
            tracing::info!(applied = ?report.applied, doorbell = report.doorbell, "the database is up to date");
        }
        tracing::info!(listen = %app.addr(), "serving");
        let outdated = tokio::select! {
            () = &mut stop => false,
            () = app.outdated() => true,
        };
        tracing::info!("stopping: streams end, claims that reached nobody go back");
        app.shut_down().await?;
        tracing::info!("stopped");
        anyhow::ensure!(!outdated, "a newer server has migrated the database; this one must be upgraded");
        Ok(())
    })
}

/// Migrates, or says what that would do, or takes everything of ours away.
pub(super) fn migrate(args: &MigrateArgs) -> anyhow::Result<()> {
    let database = resolve_database(args.database_url.as_ref())?;
    let options = migrate::Options { doorbell: args.doorbell, no_doorbell: args.no_doorbell };
    let runtime = super::runtime()?;
    if args.remove {
        runtime.block_on(migrate::remove(&database, args.force))?;
        println!("the side schema and its triggers are gone; schema absurd stays");
    } else if args.check {
        println!("{}", describe(&runtime.block_on(migrate::check(&database, options))?, "to apply"));
    } else {
        println!("{}", describe(&runtime.block_on(migrate::migrate(&database, options))?, "applied"));
    }
    Ok(())
}

fn describe(report: &Report, verb: &str) -> String {
    let origin = match report.origin {
        Origin::Ours => "the storage contract is installed by this program",
        Origin::Adopted => "schema absurd was installed by upstream's tool and stays as it is",
    };
    let applied = if report.applied.is_empty() {
        "nothing to do".to_owned()
    } else {
        format!("{verb}: {}", report.applied.join(", "))
    };
    let doorbell = if report.doorbell { "on" } else { "off (tasks from SQL are found within two seconds)" };
    format!("{applied}\norigin:   {origin}\ndoorbell: {doorbell}")
}
