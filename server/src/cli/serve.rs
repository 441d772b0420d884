//! `absurd serve` and `absurd migrate`.

use std::process::ExitCode;

use tokio_postgres::config::Host;

use crate::app::App;
use crate::cli::output::out;
use crate::cli::{MigrateArgs, ServeArgs, asked_to_stop, block_on, log};
use crate::settings::{Settings, resolve_database};
use crate::store::migrate::{self, Origin, Report};

/// Serves until asked to stop.
pub(super) fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let file = args.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
    let settings = args.settings.or(file);
    log(settings.log.as_deref().unwrap_or("info"), settings.log_json.unwrap_or(false))?;
    let options = settings.into_app_options()?;
    let database = named(&options.database);
    block_on(async move {
        let mut stop = std::pin::pin!(asked_to_stop());
        let app = tokio::select! {
            app = App::start(options) => app?,
            () = &mut stop => return Ok(()),
        };
        if let Some(report) = app.migrated() {
            tracing::info!(applied = ?report.applied, doorbell = report.doorbell, "the database is up to date");
        }
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            database,
            metrics = app.metrics_addr().map(tracing::field::display),
            listen = %app.addr(),
            "serving"
        );
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

/// Host, port and name of a database, for the log: they identify it, and hold no secret.
fn named(database: &tokio_postgres::Config) -> String {
    let ports = database.get_ports();
    let hosts: Vec<String> = database
        .get_hosts()
        .iter()
        .enumerate()
        .map(|(index, host)| {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            match host {
                Host::Tcp(name) => format!("{name}:{port}"),
                Host::Unix(folder) => folder.display().to_string(),
            }
        })
        .collect();
    format!("{}/{}", hosts.join(","), database.get_dbname().or(database.get_user()).unwrap_or_default())
}

/// Exit code of `migrate --check` if a migration would change something.
const WORK_TO_DO: u8 = 2;

/// Migrates; or with `--check` reports the pending migrations; or with `--remove` removes the side schema and its
/// triggers.
pub(super) fn migrate(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let database = resolve_database(args.database_url.as_ref())?;
    let options = migrate::Options { doorbell: args.doorbell, no_doorbell: args.no_doorbell };
    let runtime = super::runtime()?;
    if args.remove {
        runtime.block_on(migrate::remove(&database, args.force))?;
        out!("the side schema and its triggers are gone; schema absurd stays");
    } else if args.check {
        let report = runtime.block_on(migrate::check(&database, options))?;
        out!("{}", describe(&report, "to apply"));
        return Ok(if report.applied.is_empty() { ExitCode::SUCCESS } else { WORK_TO_DO.into() });
    } else {
        out!("{}", describe(&runtime.block_on(migrate::migrate(&database, options))?, "applied"));
    }
    Ok(ExitCode::SUCCESS)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_named_without_its_password() {
        for (url, name) in [
            ("postgresql://me:hunter2@db.example:6000/app", "db.example:6000/app"),
            ("host=/run/postgresql user=me password=hunter2", "/run/postgresql/me"),
            ("postgresql://me@a,b:6001/app", "a:5432,b:6001/app"),
        ] {
            assert_eq!(named(&url.parse().unwrap()), name);
        }
    }
}
