//! Installs and upgrades the schemas: forward only, under an advisory lock, so that two replicas may start at once.

use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use tokio_postgres::{Client, Config, NoTls};

use crate::domain::Error;

/// Key of the advisory lock: the bytes of "absurd".
const LOCK: i64 = 0x6162_7375_7264;
/// What this server is, compared with a migration's `min_server`.
const SERVER_GENERATION: i32 = 1;

const CONTRACT: &[(&str, &str)] = &[
    ("01_time_and_ids", include_str!("../../sql/absurd/01_time_and_ids.sql")),
    ("02_queues", include_str!("../../sql/absurd/02_queues.sql")),
    ("03_policies", include_str!("../../sql/absurd/03_policies.sql")),
    ("04_tasks", include_str!("../../sql/absurd/04_tasks.sql")),
    ("05_runs", include_str!("../../sql/absurd/05_runs.sql")),
    ("06_checkpoints", include_str!("../../sql/absurd/06_checkpoints.sql")),
    ("07_events", include_str!("../../sql/absurd/07_events.sql")),
    ("08_cleanup", include_str!("../../sql/absurd/08_cleanup.sql")),
    ("09_detach", include_str!("../../sql/absurd/09_detach.sql")),
    ("10_cron", include_str!("../../sql/absurd/10_cron.sql")),
    ("11_existing_queues", include_str!("../../sql/absurd/11_existing_queues.sql")),
];

/// A forward step of the side schema.
struct Migration {
    version: i32,
    name: &'static str,
    /// Oldest server generation that runs on a database with this step.
    min_server: i32,
    sql: &'static [&'static str],
}

const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    name: "side_schema",
    min_server: 1,
    sql: &[include_str!("../../sql/side/01_schema.sql"), include_str!("../../sql/side/02_doorbell.sql")],
}];

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
    client.batch_execute(&format!("select pg_advisory_lock({LOCK})")).await.map_err(|e| fail(&e))?;
    let report = apply(&client, options).await;
    // Closing the session would unlock too; this way the next one need not wait for that.
    let unlocked = client.batch_execute(&format!("select pg_advisory_unlock({LOCK})")).await;
    unlocked.map_err(|error| fail(&error))?;
    report
}

async fn connect(database: &Config) -> Result<Client, Error> {
    let mut config = database.clone();
    config.application_name("absurd migrate");
    let (client, connection) = config.connect(NoTls).await.map_err(|error| fail(&error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the migration's connection ended");
        }
    });
    client
        .batch_execute("set client_min_messages = warning; set absurd_server.writer = 'on'")
        .await
        .map_err(|error| fail(&error))?;
    Ok(client)
}

async fn apply(client: &Client, options: Options) -> Result<Report, Error> {
    let origin = origin(client).await?;
    let mut applied = Vec::new();
    if origin == Origin::Ours {
        let sum = contract_checksum();
        if setting(client, "contract_checksum").await?.as_deref() != Some(sum.as_str()) {
            let mut sql = String::from("begin;");
            for (name, text) in CONTRACT {
                let _ = writeln!(sql, "-- {name}\n{text}");
            }
            sql.push_str("commit;");
            step(client, &sql).await?;
            applied.push(format!("contract ({} files)", CONTRACT.len()));
        }
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

async fn apply_one(client: &Client, migration: &Migration) -> Result<Option<String>, Error> {
    let text = migration.sql.concat();
    let sum = checksum(&text);
    let known = relation_exists(client, "absurd_server.migration").await?;
    if known {
        let row = client
            .query_opt("select checksum from absurd_server.migration where version = $1", &[&migration.version])
            .await
            .map_err(|error| fail(&error))?;
        if let Some(row) = row {
            let stored: String = row.get(0);
            if stored == sum {
                return Ok(None);
            }
        }
    }
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

/// A schema `absurd` that our setting does not claim was installed by upstream; only release 0.5.1 is adopted.
async fn origin(client: &Client) -> Result<Origin, Error> {
    if relation_exists(client, "absurd_server.setting").await? {
        match setting(client, "origin").await?.as_deref() {
            Some("ours") => return Ok(Origin::Ours),
            Some("adopted") => return Ok(Origin::Adopted),
            _ => {}
        }
    }
    if !relation_exists(client, "absurd.queues").await? {
        return Ok(Origin::Ours);
    }
    let known: bool = client
        .query_one("select to_regprocedure('absurd.get_schema_version()') is not null", &[])
        .await
        .map_err(|error| fail(&error))?
        .get(0);
    let version: Option<String> = if known {
        client.query_one("select absurd.get_schema_version()", &[]).await.map_err(|error| fail(&error))?.get(0)
    } else {
        None
    };
    // The catalogue decides: release 0.5.0 brought this function, and the retry rules that we rely on.
    let current: bool = client
        .query_one("select to_regprocedure('absurd.retry_delay_seconds(jsonb, integer)') is not null", &[])
        .await
        .map_err(|error| fail(&error))?
        .get(0);
    if current {
        return Ok(Origin::Adopted);
    }
    Err(Error::Unavailable(format!(
        "schema absurd is of release {}; upgrade it first: absurdctl migrate",
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
        return Err(Error::Unavailable(format!(
            "the database needs a server of generation {wanted} or newer, this one is {SERVER_GENERATION}; upgrade it"
        )));
    }
    Ok(())
}

async fn doorbell(client: &Client, origin: Origin, options: Options) -> Result<bool, Error> {
    let before = setting(client, "doorbell").await?;
    let wanted = if options.no_doorbell {
        false
    } else if options.doorbell {
        true
    } else {
        before.as_deref().map_or(origin == Origin::Ours, |value| value == "on")
    };
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

/// What a server must know of the database before it serves.
pub async fn inspect(client: &Client) -> Result<Option<bool>, Error> {
    if !relation_exists(client, "absurd_server.setting").await? {
        return Ok(None);
    }
    refuse_newer(client).await?;
    Ok(Some(setting(client, "doorbell").await?.as_deref() == Some("on")))
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
    let text = error.as_db_error().map_or_else(
        || error.to_string(),
        |database| {
            let position = match database.position() {
                Some(tokio_postgres::error::ErrorPosition::Original(at)) => format!(" at {at}"),
                _ => String::new(),
            };
            format!("{} {}{position}", database.code().code(), database.message())
        },
    );
    Error::Unavailable(text)
}
