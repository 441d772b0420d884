//! Installs and upgrades the schemas, forward only. An advisory lock serializes migrations, so two replicas may start
//! at once.

use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use tokio_postgres::{Client, Config};

use crate::domain::Error;

/// Key of the advisory lock: the bytes of "absurd".
const LOCK: i64 = 0x6162_7375_7264;
/// Generation of this server. A database whose `min_server` is greater refuses it.
pub const SERVER_GENERATION: i32 = 2;
/// Oldest generation of servers that may run on the side schema of this server.
const MIN_SERVER: i32 = 2;
/// Version of the side schema's text. Every change of the text needs a new version (`server/sql/versions`).
const SIDE_VERSION: i32 = 9;
/// Version of the storage contract's text. Every change of the text needs a new version.
const CONTRACT_VERSION: i32 = 2;

/// Cleanup functions, installed in both schemas.
const CLEANUP: &str = include_str!("../../sql/absurd/08_cleanup.sql");

const CONTRACT: &[(&str, &str)] = &[
    ("01_time_and_ids", include_str!("../../sql/absurd/01_time_and_ids.sql")),
    ("02_queues", include_str!("../../sql/absurd/02_queues.sql")),
    ("03_policies", include_str!("../../sql/absurd/03_policies.sql")),
    ("04_tasks", include_str!("../../sql/absurd/04_tasks.sql")),
    ("05_runs", include_str!("../../sql/absurd/05_runs.sql")),
    ("06_checkpoints", include_str!("../../sql/absurd/06_checkpoints.sql")),
    ("07_events", include_str!("../../sql/absurd/07_events.sql")),
    ("08_cleanup", CLEANUP),
    ("09_cleanup_all_queues", include_str!("../../sql/absurd/09_cleanup_all_queues.sql")),
    ("10_detach", include_str!("../../sql/absurd/10_detach.sql")),
    ("11_cron", include_str!("../../sql/absurd/11_cron.sql")),
    ("12_existing_queues", include_str!("../../sql/absurd/12_existing_queues.sql")),
];

/// Files of the side schema. Each can be applied again, over any older version of itself.
const SIDE: &[&str] = &[
    include_str!("../../sql/side/01_schema.sql"),
    include_str!("../../sql/side/02_doorbell.sql"),
    "-- {cleanup}",
    include_str!("../../sql/side/03_upkeep.sql"),
    include_str!("../../sql/side/04_events.sql"),
    include_str!("../../sql/side/05_time.sql"),
    include_str!("../../sql/side/06_workflows.sql"),
    include_str!("../../sql/side/07_awaited.sql"),
    include_str!("../../sql/side/08_emissions.sql"),
    include_str!("../../sql/side/09_quarantine.sql"),
];

/// The complete SQL text of the side schema.
pub fn side_text() -> String {
    let cleanup = CLEANUP.replace("function absurd.cleanup_", "function absurd_server.cleanup_");
    SIDE.iter().map(|part| part.replace("-- {cleanup}", &cleanup)).collect()
}

/// The complete SQL text of the storage contract.
pub fn contract_text() -> String {
    CONTRACT.iter().fold(String::new(), |mut text, (name, part)| {
        let _ = writeln!(text, "-- {name}\n{part}");
        text
    })
}

/// Installer of the storage contract in a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// This server installed it, or will.
    Ours,
    /// Upstream's own tool installed it. Migrations leave schema `absurd` as it is.
    Adopted,
}

/// Result of a migration, or of a dry run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Installer of the storage contract.
    pub origin: Origin,
    /// Names of the steps that were applied. After a dry run: that would be.
    pub applied: Vec<String>,
    /// Whether the doorbell trigger is installed on the queues. After a dry run: whether it would be.
    pub doorbell: bool,
}

/// Options of a migration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Install the doorbell trigger in an adopted database too. By default only our own databases get it.
    pub doorbell: bool,
    /// Install no doorbell trigger, and drop those that exist. Wins over `doorbell`.
    pub no_doorbell: bool,
}

/// Migrates a database, over a connection of its own.
pub async fn migrate(database: &Config, options: Options) -> Result<Report, Error> {
    let client = connect(database).await?;
    super::connect::check_for_migration(database, &client).await?;
    take_lock(&client).await?;
    let report = apply(&client, options).await;
    release_lock(&client).await?;
    report
}

/// Reports the steps that [`migrate`] would apply, and changes nothing.
pub async fn check(database: &Config, options: Options) -> Result<Report, Error> {
    let client = connect(database).await?;
    super::connect::check_for_migration(database, &client).await?;
    let origin = origin(&client).await?;
    let versions = versions(&client, origin).await?;
    versions.refuse_newer()?;
    let doorbell = wants_doorbell(&client, origin, options).await?;
    Ok(Report { origin, applied: versions.steps(), doorbell })
}

/// Removes the doorbell triggers and the side schema; the storage contract stays. Refuses while a server runs on the
/// database. Without `force`, also refuses while workflow runs are stored.
pub async fn remove(database: &Config, force: bool) -> Result<(), Error> {
    let client = connect(database).await?;
    take_lock(&client).await?;
    let removed = remove_all(&client, force).await;
    release_lock(&client).await?;
    removed
}

async fn remove_all(client: &Client, force: bool) -> Result<(), Error> {
    if !relation_exists(client, "absurd_server.setting").await? {
        return Ok(());
    }
    let one = |sql: &'static str| async move {
        client.query_one(sql, &[]).await.map(|row| row.get::<_, bool>(0)).map_err(|error| fail(&error))
    };
    if one(
        "select exists (select from absurd_server.replica where seen_at > clock_timestamp() - interval '10 seconds')",
    )
    .await?
    {
        return Err(Error::Setup("a server runs on this database; stop it first".into()));
    }
    if !force
        && relation_exists(client, "absurd_server.workflow_run").await?
        && one("select exists (select from absurd_server.workflow_run)").await?
    {
        return Err(Error::Setup("workflow runs are stored; --force removes them too".into()));
    }
    let triggers = client
        .query(
            "select tgrelid::regclass::text from pg_trigger where tgname = 'absurd_server_doorbell' and tgparentid = 0",
            &[],
        )
        .await
        .map_err(|error| fail(&error))?;
    let mut sql = String::from("begin; set local lock_timeout = '10s';");
    for row in &triggers {
        let _ = write!(sql, "drop trigger absurd_server_doorbell on {};", row.get::<_, &str>(0));
    }
    sql.push_str("drop schema absurd_server cascade; commit;");
    step(client, &sql).await
}

async fn take_lock(client: &Client) -> Result<(), Error> {
    client.batch_execute(&format!("select pg_advisory_lock({LOCK})")).await.map_err(|error| fail(&error))
}

/// Releases the lock explicitly, so that the next migration need not wait until this session is closed.
async fn release_lock(client: &Client) -> Result<(), Error> {
    client.batch_execute(&format!("select pg_advisory_unlock({LOCK})")).await.map_err(|error| fail(&error))
}

async fn connect(database: &Config) -> Result<Client, Error> {
    let client = super::connect::connect(database, "absurd migrate").await?;
    client
        .batch_execute(
            "set client_min_messages = warning; set absurd_server.writer = 'on'; set standard_conforming_strings = on",
        )
        .await
        .map_err(|error| fail(&error))?;
    Ok(client)
}

async fn apply(client: &Client, options: Options) -> Result<Report, Error> {
    let origin = origin(client).await?;
    let versions = versions(client, origin).await?;
    versions.refuse_newer()?;
    if versions.contract_is_old() {
        step(client, &format!("begin;\n{}\ncommit;", contract_text())).await?;
    }
    if versions.side_is_old() {
        apply_side(client).await?;
    }
    put(client, "origin", if origin == Origin::Ours { "ours" } else { "adopted" }).await?;
    if versions.contract_is_old() {
        put(client, "contract_version", &CONTRACT_VERSION.to_string()).await?;
        put(client, "contract_checksum", &checksum(&contract_text())).await?;
    }
    let doorbell = doorbell(client, origin, options).await?;
    Ok(Report { origin, applied: versions.steps(), doorbell })
}

/// Applies the side schema and records its version, in one transaction.
async fn apply_side(client: &Client) -> Result<(), Error> {
    let text = side_text();
    let note = format!(
        "insert into absurd_server.migration (version, name, checksum, min_server)
         values ({SIDE_VERSION}, '{}', '{}', {MIN_SERVER})",
        env!("CARGO_PKG_VERSION"),
        checksum(&text)
    );
    step(client, &format!("begin;\n{text}\n{note};\ncommit;")).await
}

/// Versions of the schemas in a database; 0 means that a schema is absent. Versions alone decide which steps are
/// applied. A text is never applied over that of a newer version, whatever its checksum.
#[derive(Debug, Clone, Copy)]
struct Versions {
    origin: Origin,
    side: i32,
    contract: i32,
    min_server: i32,
}

impl Versions {
    fn side_is_old(self) -> bool {
        self.side < SIDE_VERSION
    }

    fn contract_is_old(self) -> bool {
        self.origin == Origin::Ours && self.contract < CONTRACT_VERSION
    }

    /// Names of the steps that a migration has to apply.
    fn steps(self) -> Vec<String> {
        let from = |version: i32| if version == 0 { String::new() } else { format!("{version} to ") };
        let contract = format!("storage contract (version {}{CONTRACT_VERSION})", from(self.contract));
        let side = format!("side schema (version {}{SIDE_VERSION})", from(self.side));
        let steps = [(self.contract_is_old(), contract), (self.side_is_old(), side)];
        steps.into_iter().filter_map(|(old, step)| old.then_some(step)).collect()
    }

    /// Refuses a database that a newer server has migrated, if its `min_server` excludes this server.
    fn refuse_newer(self) -> Result<(), Error> {
        if self.min_server > SERVER_GENERATION {
            return Err(Error::Setup(format!(
                "a newer server has migrated the database: its side schema of version {} needs servers of generation {}, and \
                 this one, absurd {}, is of generation {SERVER_GENERATION}; nothing was changed: upgrade this server",
                self.side,
                self.min_server,
                env!("CARGO_PKG_VERSION")
            )));
        }
        Ok(())
    }

    /// Refuses schemas that are older than those of this server.
    fn refuse_older(self) -> Result<(), Error> {
        let steps = self.steps();
        if steps.is_empty() {
            return Ok(());
        }
        Err(Error::Setup(format!(
            "the database is older than this server; not applied yet: {}; run `absurd migrate`, or add --migrate",
            steps.join(", ")
        )))
    }
}

async fn versions(client: &Client, origin: Origin) -> Result<Versions, Error> {
    let (mut side, mut min_server) = (0, 0);
    if relation_exists(client, "absurd_server.migration").await? {
        let row = client
            .query_one(
                "select coalesce(max(version), 0), coalesce(max(min_server), 0) from absurd_server.migration",
                &[],
            )
            .await
            .map_err(|error| fail(&error))?;
        (side, min_server) = (row.get(0), row.get(1));
    }
    // Databases older than the version numbers stored only a checksum; they count as version 1.
    let contract = match setting(client, "contract_version").await? {
        Some(version) => version.parse().unwrap_or(0),
        None => i32::from(setting(client, "contract_checksum").await?.is_some()),
    };
    Ok(Versions { origin, side, contract, min_server })
}

async fn step(client: &Client, sql: &str) -> Result<(), Error> {
    if let Err(error) = client.batch_execute(sql).await {
        let _ = client.batch_execute("rollback").await;
        return Err(fail(&error));
    }
    Ok(())
}

/// Determines the installer of schema `absurd`. A schema without our mark is upstream's, and is adopted from release
/// 0.4.0 on.
async fn origin(client: &Client) -> Result<Origin, Error> {
    match setting(client, "origin").await?.as_deref() {
        Some("ours") => return Ok(Origin::Ours),
        Some("adopted") => return Ok(Origin::Adopted),
        _ => {}
    }
    // Decided by the functions that we rely on, not by the version that the schema reports.
    let row = client
        .query_one(
            "select to_regclass('absurd.queues') is not null,
                    coalesce(obj_description(to_regnamespace('absurd'), 'pg_namespace') like '%installed by absurd-server', false),
                    to_regprocedure('absurd.get_schema_version()') is not null,
                    to_regprocedure('absurd.get_queue_policy(text)') is not null",
            &[],
        )
        .await
        .map_err(|error| fail(&error))?;
    let [there, ours, versioned, current] = [0, 1, 2, 3].map(|column| row.get::<_, bool>(column));
    if !there || ours {
        return Ok(Origin::Ours);
    }
    if current {
        return Ok(Origin::Adopted);
    }
    let version = if versioned {
        let row = client.query_one("select absurd.get_schema_version()", &[]).await.map_err(|error| fail(&error))?;
        row.get::<_, Option<String>>(0)
    } else {
        None
    };
    Err(Error::Setup(format!(
        "schema absurd is of release {}, older than 0.4.0; upgrade it first: absurdctl migrate",
        version.as_deref().unwrap_or("unknown")
    )))
}

async fn wants_doorbell(client: &Client, origin: Origin, options: Options) -> Result<bool, Error> {
    if options.no_doorbell || options.doorbell {
        return Ok(options.doorbell && !options.no_doorbell);
    }
    let before = setting(client, "doorbell").await?;
    Ok(before.as_deref().map_or(origin == Origin::Ours, |value| value == "on"))
}

async fn doorbell(client: &Client, origin: Origin, options: Options) -> Result<bool, Error> {
    let wanted = wants_doorbell(client, origin, options).await?;
    put(client, "doorbell", if wanted { "on" } else { "off" }).await?;
    let queues = client
        .query("select queue_name from absurd.queues order by queue_name", &[])
        .await
        .map_err(|error| fail(&error))?;
    for row in queues {
        let queue: String = row.get(0);
        if wanted {
            client
                .execute("select absurd_server.install_doorbell($1)", &[&queue])
                .await
                .map_err(|error| fail(&error))?;
        } else if options.no_doorbell {
            for kind in ["r", "e"] {
                let table = format!("absurd.\"{kind}_{}\"", queue.replace('"', "\"\""));
                step(client, &format!("drop trigger if exists absurd_server_doorbell on {table}")).await?;
            }
        }
    }
    Ok(wanted)
}

/// Facts about a migrated database that a server needs at its start.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Installer of schema `absurd`.
    pub origin: Origin,
    /// Whether queues get the doorbell trigger, as the newest migration decided.
    pub doorbell: bool,
}

/// Reads the facts about a migrated database, or `None` for one that was never migrated. Fails if its schemas are older
/// than this server, or exclude it.
pub async fn inspect(client: &Client) -> Result<Option<Known>, Error> {
    if !relation_exists(client, "absurd_server.setting").await? {
        return Ok(None);
    }
    let origin = origin(client).await?;
    let versions = versions(client, origin).await?;
    versions.refuse_newer()?;
    versions.refuse_older()?;
    let doorbell = setting(client, "doorbell").await?.as_deref() == Some("on");
    Ok(Some(Known { origin, doorbell }))
}

async fn relation_exists(client: &Client, name: &str) -> Result<bool, Error> {
    let row =
        client.query_one("select to_regclass($1::text) is not null", &[&name]).await.map_err(|error| fail(&error))?;
    Ok(row.get(0))
}

async fn setting(client: &Client, name: &str) -> Result<Option<String>, Error> {
    if !relation_exists(client, "absurd_server.setting").await? {
        return Ok(None);
    }
    let row = client
        .query_opt("select value from absurd_server.setting where name = $1", &[&name])
        .await
        .map_err(|error| fail(&error))?;
    Ok(row.map(|row| row.get(0)))
}

async fn put(client: &Client, name: &str, value: &str) -> Result<(), Error> {
    client
        .execute(
            "insert into absurd_server.setting as s (name, value) values ($1, $2)
                 on conflict (name) do update set value = excluded.value where s.value <> excluded.value",
            &[&name, &value],
        )
        .await
        .map_err(|error| fail(&error))?;
    Ok(())
}

fn checksum(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn fail(error: &tokio_postgres::Error) -> Error {
    let position = match error.as_db_error().and_then(tokio_postgres::error::DbError::position) {
        Some(tokio_postgres::error::ErrorPosition::Original(at)) => format!(" at {at}"),
        _ => String::new(),
    };
    Error::Setup(super::fault::explain(error) + &position)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database knows its schemas by version number only, so two texts must never share a version.
    #[test]
    fn each_text_has_a_version_of_its_own() {
        let known = include_str!("../../sql/versions");
        for (schema, version, text) in
            [("side", SIDE_VERSION, side_text()), ("contract", CONTRACT_VERSION, contract_text())]
        {
            let line = format!("{schema} {version} {}", checksum(&text));
            let raise =
                format!("the {schema} schema has changed: raise its version in migrate.rs, and add to sql/versions:");
            assert!(known.lines().any(|known| known == line), "{raise}\n{line}");
            let newer = format!("{schema} {} ", version + 1);
            assert!(!known.lines().any(|known| known.starts_with(&newer)), "sql/versions knows a newer {schema}");
        }
        let lines = known.lines().filter(|line| !line.starts_with('#'));
        let names: Vec<&str> = lines.filter_map(|line| line.rsplit_once(' ').map(|(name, _)| name)).collect();
        let mut once = names.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(names.len(), once.len(), "a version has one text");
    }
}
