//! Installs and upgrades the schemas: forward only, under an advisory lock, so that two replicas may start at once.

use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use tokio_postgres::{Client, Config};

use crate::domain::Error;

/// Key of the advisory lock: the bytes of "absurd".
const LOCK: i64 = 0x6162_7375_7264;
/// What this server is, compared with a migration's `min_server`.
const SERVER_GENERATION: i32 = 1;

/// Serves in both schemas.
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

/// A forward step of the side schema.
struct Migration {
    version: i32,
    name: &'static str,
    /// Oldest server generation that runs on a database with this step.
    min_server: i32,
    sql: &'static [&'static str],
}

impl Migration {
    fn text(&self) -> String {
        let cleanup = CLEANUP.replace("function absurd.cleanup_", "function absurd_server.cleanup_");
        self.sql.iter().map(|part| part.replace("-- {cleanup}", &cleanup)).collect()
    }
}

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "side_schema",
        min_server: 1,
        sql: &[include_str!("../../sql/side/01_schema.sql"), include_str!("../../sql/side/02_doorbell.sql")],
    },
    Migration {
        version: 2,
        name: "upkeep",
        min_server: 1,
        sql: &["-- {cleanup}", include_str!("../../sql/side/03_upkeep.sql")],
    },
    Migration { version: 3, name: "events", min_server: 1, sql: &[include_str!("../../sql/side/04_events.sql")] },
    Migration { version: 4, name: "time", min_server: 1, sql: &[include_str!("../../sql/side/05_time.sql")] },
    Migration { version: 5, name: "workflows", min_server: 1, sql: &[include_str!("../../sql/side/06_workflows.sql")] },
    Migration { version: 6, name: "awaited", min_server: 1, sql: &[include_str!("../../sql/side/07_awaited.sql")] },
    Migration { version: 7, name: "emissions", min_server: 1, sql: &[include_str!("../../sql/side/08_emissions.sql")] },
    Migration {
        version: 8,
        name: "quarantine",
        min_server: 1,
        sql: &[include_str!("../../sql/side/09_quarantine.sql")],
    },
];

/// Where the storage contract in a database comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Installed by us.
    Ours,
    /// Installed by upstream's own tool; schema `absurd` stays as it is.
    Adopted,
}

/// What a migration did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Whose database it is.
    pub origin: Origin,
    /// Steps that were applied, by name.
    pub applied: Vec<String>,
    /// Whether the doorbell hangs on the queues.
    pub doorbell: bool,
}

/// How to migrate.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Hang the doorbell in an adopted database too.
    pub doorbell: bool,
    /// Never hang it, and take it down.
    pub no_doorbell: bool,
}

/// Connects on its own and migrates.
pub async fn migrate(database: &Config, options: Options) -> Result<Report, Error> {
    let client = connect(database).await?;
    super::connect::check_for_migration(database, &client).await?;
    take_lock(&client).await?;
    let report = apply(&client, options).await;
    release_lock(&client).await?;
    report
}

/// Says what [`migrate`] would do, and does nothing.
pub async fn check(database: &Config, options: Options) -> Result<Report, Error> {
    let client = connect(database).await?;
    let origin = origin(&client).await?;
    let mut applied = Vec::new();
    if origin == Origin::Ours && contract_is_old(&client).await? {
        applied.push(contract_step());
    }
    for migration in MIGRATIONS {
        if !is_applied(&client, migration).await? {
            applied.push(migration.name.to_owned());
        }
    }
    let doorbell = wants_doorbell(&client, origin, options).await?;
    Ok(Report { origin, applied, doorbell })
}

/// Takes away everything of ours but the storage contract: the triggers first, then the side schema with all in it.
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

/// Closing the session would unlock too; this way the next one need not wait for that.
async fn release_lock(client: &Client) -> Result<(), Error> {
    client.batch_execute(&format!("select pg_advisory_unlock({LOCK})")).await.map_err(|error| fail(&error))
}

async fn connect(database: &Config) -> Result<Client, Error> {
    let client = super::connect::connect(database, "absurd migrate").await?;
    client
        .batch_execute("set client_min_messages = warning; set absurd_server.writer = 'on'")
        .await
        .map_err(|error| fail(&error))?;
    Ok(client)
}

async fn apply(client: &Client, options: Options) -> Result<Report, Error> {
    let origin = origin(client).await?;
    let mut applied = Vec::new();
    if origin == Origin::Ours && contract_is_old(client).await? {
        let mut sql = String::from("begin;");
        for (name, text) in CONTRACT {
            let _ = writeln!(sql, "-- {name}\n{text}");
        }
        sql.push_str("commit;");
        step(client, &sql).await?;
        applied.push(contract_step());
    }
    for migration in MIGRATIONS {
        if let Some(name) = apply_one(client, migration).await? {
            applied.push(name);
        }
    }
    refuse_newer(client).await?;
    put(client, "origin", if origin == Origin::Ours { "ours" } else { "adopted" }).await?;
    if origin == Origin::Ours {
        put(client, "contract_checksum", &contract_checksum()).await?;
    }
    let doorbell = doorbell(client, origin, options).await?;
    Ok(Report { origin, applied, doorbell })
}

async fn contract_is_old(client: &Client) -> Result<bool, Error> {
    Ok(setting(client, "contract_checksum").await?.as_deref() != Some(contract_checksum().as_str()))
}

fn contract_step() -> String {
    format!("contract ({} files)", CONTRACT.len())
}

async fn is_applied(client: &Client, migration: &Migration) -> Result<bool, Error> {
    if !relation_exists(client, "absurd_server.migration").await? {
        return Ok(false);
    }
    let row = client
        .query_opt("select checksum from absurd_server.migration where version = $1", &[&migration.version])
        .await
        .map_err(|error| fail(&error))?;
    Ok(row.is_some_and(|row| row.get::<_, String>(0) == checksum(&migration.text())))
}

async fn apply_one(client: &Client, migration: &Migration) -> Result<Option<String>, Error> {
    if is_applied(client, migration).await? {
        return Ok(None);
    }
    let text = migration.text();
    let sum = checksum(&text);
    step(client, &format!("begin;\n{text}\ncommit;")).await?;
    client
        .execute(
            "insert into absurd_server.migration (version, name, checksum, min_server) values ($1, $2, $3, $4)
                 on conflict (version) do update set checksum = excluded.checksum, min_server = excluded.min_server",
            &[&migration.version, &migration.name, &sum, &migration.min_server],
        )
        .await
        .map_err(|error| fail(&error))?;
    Ok(Some(migration.name.to_owned()))
}

async fn step(client: &Client, sql: &str) -> Result<(), Error> {
    if let Err(error) = client.batch_execute(sql).await {
        let _ = client.batch_execute("rollback").await;
        return Err(fail(&error));
    }
    Ok(())
}

/// A schema `absurd` that we did not mark as ours was installed by upstream; release 0.4.0 and newer are adopted.
async fn origin(client: &Client) -> Result<Origin, Error> {
    match setting(client, "origin").await?.as_deref() {
        Some("ours") => return Ok(Origin::Ours),
        Some("adopted") => return Ok(Origin::Adopted),
        _ => {}
    }
    // The catalogue decides, not the version: columns and functions that came with a release and that we rely on.
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

/// A newer server may have added steps; it says in `min_server` whether older ones may still run.
async fn refuse_newer(client: &Client) -> Result<(), Error> {
    let row = client
        .query_one("select coalesce(max(min_server), 0) from absurd_server.migration", &[])
        .await
        .map_err(|error| fail(&error))?;
    let wanted: i32 = row.get(0);
    if wanted > SERVER_GENERATION {
        return Err(Error::Setup(format!(
            "the database needs a server of generation {wanted} or newer, this one is {SERVER_GENERATION}; upgrade it"
        )));
    }
    Ok(())
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

/// What a server must know of its database.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Whose schema `absurd` is.
    pub origin: Origin,
    /// Whether the doorbell hangs.
    pub doorbell: bool,
}

/// What is known of a migrated database.
pub async fn inspect(client: &Client) -> Result<Option<Known>, Error> {
    if !relation_exists(client, "absurd_server.setting").await? {
        return Ok(None);
    }
    refuse_newer(client).await?;
    let doorbell = setting(client, "doorbell").await?.as_deref() == Some("on");
    Ok(Some(Known { origin: origin(client).await?, doorbell }))
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

fn contract_checksum() -> String {
    checksum(&CONTRACT.iter().map(|(_, text)| *text).collect::<String>())
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
