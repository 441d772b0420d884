//! Connections outside the pools, and the checks of a database before a server or a migration uses it.

use tokio_postgres::{Client, Config, NoTls};

use super::fault;
use crate::domain::Error;

/// Rounds of the check for a pooler. A pooler that assigns backends at random is detected in the first round with even
/// odds.
const ROUNDS: usize = 5;

/// Properties of a database, read before a server or a migration uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Name of the server encoding, as `pg_encoding_to_char` returns it.
    pub encoding: String,
    /// Whether it is a standby, which takes no writes.
    pub standby: bool,
    /// Whether the role may create schemas in the database.
    pub may_create: bool,
    /// Name of the role that is connected.
    pub role: String,
    /// Name of the database.
    pub database: String,
}

impl Facts {
    /// Describes the restrictions of an encoding other than UTF8; `None` for UTF8.
    pub fn encoding_problem(&self) -> Option<String> {
        (self.encoding != "UTF8").then(|| {
            format!(
                "the database's encoding is {}: texts with letters that it does not hold, and JSON escapes of letters in any \
                 but UTF8, are refused",
                self.encoding
            )
        })
    }
}

/// Opens a connection with `name` as its `application_name`. The error contains the whole chain of causes.
pub async fn connect(database: &Config, name: &str) -> Result<Client, Error> {
    let mut config = database.clone();
    config.application_name(name);
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(std::time::Duration::from_secs(5));
    }
    let (client, connection) = config.connect(NoTls).await.map_err(|error| unreachable(&error))?;
    let name = name.to_owned();
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(name, %error, "a connection ended");
        }
    });
    Ok(client)
}

fn unreachable(error: &tokio_postgres::Error) -> Error {
    let text = fault::explain(error);
    let hint = if text.contains("TLS") || text.contains("no encryption") {
        "; connections to Postgres are made without TLS for now"
    } else {
        ""
    };
    Error::Setup(format!("cannot connect to the database: {text}{hint}"))
}

/// Checks a database before a server or a migration uses it. Refuses a pooler in transaction mode, because session
/// settings, locks and prepared statements would not stay with the session. Refuses an installation in which PL/pgSQL
/// does not run.
pub async fn check(database: &Config, client: &Client) -> Result<Facts, Error> {
    refuse_pooler(database, client).await?;
    let failed = |error: tokio_postgres::Error| Error::Setup(fault::explain(&error));
    client
        .batch_execute("do $$ begin end $$")
        .await
        .map_err(|error| Error::DatabaseBroken(format!("PL/pgSQL does not run in it: {}", fault::explain(&error))))?;
    let row = client
        .query_one(
            "select pg_encoding_to_char(encoding), pg_is_in_recovery(), has_database_privilege(oid, 'CREATE'),
                    current_user::text, datname::text
               from pg_database where datname = current_database()",
            &[],
        )
        .await
        .map_err(failed)?;
    Ok(Facts {
        encoding: row.get(0),
        standby: row.get(1),
        may_create: row.get(2),
        role: row.get(3),
        database: row.get(4),
    })
}

/// Like [`check`], and for a migration: refuses a standby, and a role that cannot create the schemas.
pub async fn check_for_migration(database: &Config, client: &Client) -> Result<Facts, Error> {
    let facts = check(database, client).await?;
    let Facts { role, database, .. } = &facts;
    let there = client.query_one("select to_regnamespace('absurd_server') is not null", &[]).await;
    let there: bool = there.map_err(|error| Error::Setup(fault::explain(&error)))?.get(0);
    if !facts.may_create && !there {
        return Err(Error::Setup(format!(
            "role {role:?} may not create schemas in database {database:?}; an owner of it grants that: grant create on \
             database \"{database}\" to \"{role}\""
        )));
    }
    if facts.standby {
        return Err(Error::Setup(format!("database {database:?} is a standby, and takes no writes; name the primary")));
    }
    if let Some(problem) = facts.encoding_problem() {
        tracing::warn!("{problem}; a database for this server is made with encoding 'UTF8' template template0");
    }
    Ok(facts)
}

fn pooler() -> Error {
    Error::Setup(
        "the database URL leads to a pooler in transaction or statement mode (PgBouncer with pool_mode=transaction, or another \
         one), under which sessions lose their settings, locks and prepared statements: give the URL of Postgres itself, or of \
         a pool with pool_mode=session"
            .into(),
    )
}

/// Refuses a pooler that moves sessions between backends. Two sessions open at the same time must keep a backend each.
async fn refuse_pooler(database: &Config, client: &Client) -> Result<(), Error> {
    // Without room for a second session the check is skipped.
    let limit = super::pool::Role::Work.statement_timeout();
    let config = super::session_config(database, "absurd probe", limit, super::LOCK_WAIT);
    let Ok(other) = connect(&config, "absurd probe").await else { return Ok(()) };
    let backend = async |client: &Client| -> Option<i32> {
        let messages = client.simple_query("select pg_backend_pid()").await.ok()?;
        messages.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        })
    };
    let Some(first) = backend(client).await else { return Ok(()) };
    for _ in 0..ROUNDS {
        // A pooler in statement mode refuses transactions.
        other.batch_execute("begin").await.map_err(|_| pooler())?;
        let (theirs, ours) = (backend(&other).await, backend(client).await);
        let _ = other.batch_execute("rollback").await;
        if theirs == Some(first) || ours.is_some_and(|ours| ours != first) {
            return Err(pooler());
        }
    }
    let writer = other.query_one("select coalesce(current_setting('absurd_server.writer', true), '')", &[]).await;
    if writer.is_ok_and(|row| row.get::<_, &str>(0) != "on") {
        tracing::warn!(
            "a pooler before the database drops the options of sessions (ignore_startup_parameters): time limits of the server \
             do not hold; give the URL of Postgres itself"
        );
    }
    Ok(())
}
