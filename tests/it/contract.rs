//! The storage contract, seen from plain SQL. Every file runs on a database that we installed and on one that upstream's
//! tool installed: what they assert is upstream's behaviour, not our reading of it.

use std::collections::BTreeSet;

use absurd_tests::{Database, in_time, root, tool};

use tokio_postgres::Client;

const PRELUDE: &str = include_str!("contract/prelude.sql");

async fn run(database: &Database, name: &str, text: &str) {
    let sql = database.connect().await;
    sql.batch_execute("set client_min_messages = warning").await.unwrap();
    if let Err(error) = sql.batch_execute(&format!("begin;\n{PRELUDE}\n{text}\nrollback;")).await {
        let detail = error.as_db_error().map(|error| (error.message().to_owned(), error.where_().map(str::to_owned)));
        panic!("{name}: {error}: {detail:#?}");
    }
}

/// Whether upstream's ids follow the session's clock; from Postgres 18 on they come from the server's own function.
async fn ids_follow_the_clock(database: &Database) -> bool {
    let row = database.connect().await.query_one("select to_regprocedure('pg_catalog.uuidv7()') is null", &[]).await;
    row.unwrap().get(0)
}

macro_rules! contract {
    ($($name:ident $(where ids follow $clock:ident)?;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let text = include_str!(concat!("contract/", stringify!($name), ".sql"));
                run(&Database::new().await, concat!(stringify!($name), ", ours"), text).await;
                let upstream = Database::upstream("0.5.1").await;
                $(let $clock = ids_follow_the_clock(&upstream).await;
                if !$clock {
                    eprintln!("upstream's ids do not follow the clock here: only ours are looked at");
                    return;
                })?
                run(&upstream, concat!(stringify!($name), ", upstream's"), text).await;
            }
        )*
    };
}

contract! {
    ids where ids follow clock;
    queues;
    spawn;
    retries;
    claims;
    cancellation;
    checkpoints;
    events;
    cleanup;
    partitions where ids follow clock;
    cron;
}

/// What must be exactly as upstream has it: functions, columns, constraints, indexes, storage parameters.
const SHAPE: &str = include_str!("contract/shape.sql");

async fn shape(sql: &Client) -> BTreeSet<String> {
    sql.batch_execute("select absurd.create_queue('q'); select absurd.create_queue('p', 'partitioned')").await.unwrap();
    sql.query(SHAPE, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Everything that upstream's schema has is in ours, letter for letter; what is more is ours by name.
#[tokio::test(flavor = "multi_thread")]
async fn our_schema_has_the_shape_of_upstreams() {
    let ours = shape(&Database::new().await.connect().await).await;
    let theirs = shape(&Database::upstream("0.5.1").await.connect().await).await;
    let missing: Vec<&String> = theirs.difference(&ours).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(theirs.len() > 300, "{}", theirs.len());
    let known = ["_coi", "_fai", "_cai", "_completed_at_idx", "_failed_at_idx", "_cancelled_at_idx"];
    let more: Vec<&String> = ours
        .difference(&theirs)
        .filter(|line| {
            let index = line.starts_with("index ") && known.iter().any(|suffix| line.contains(suffix));
            let helper = line.starts_with("function ");
            !index && !helper && !line.contains("absurd_server_doorbell")
        })
        .collect();
    assert!(more.is_empty(), "{more:#?}");
}

/// A documented program of an original SDK or tool.
async fn program(database: &Database, program: &str, arguments: &[&str]) {
    let mut command = match program.rsplit('.').next() {
        Some("py") => tool("python", &[]),
        Some("js") => tokio::process::Command::new("node"),
        _ => tokio::process::Command::new("sh"),
    };
    command.kill_on_drop(true).arg(root().join("tests/sdks").join(program)).args(arguments);
    command.env("ABSURD_DATABASE_URL", database.url());
    let (_, socket) = database.url().rsplit_once("host=").unwrap();
    command.env("PGHOST", socket).env("PGUSER", "absurd").env("PGDATABASE", database.name());
    let output = in_time(program, command.output()).await.expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("ok"), "{program} {arguments:?}: {text}");
}

macro_rules! sdks {
    ($($name:ident = $program:literal;)*) => {
        $(
            /// On our database and on upstream's, for both storage modes.
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                for database in [Database::new().await, Database::upstream("0.5.1").await] {
                    for mode in ["unpartitioned", "partitioned"] {
                        program(&database, $program, &[mode]).await;
                    }
                }
            }
        )*
    };
}

sdks! {
    the_python_sdk_works = "python_sync.py";
    the_asynchronous_python_sdk_works = "python_async.py";
    the_typescript_sdk_works = "node/sdk.js";
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_tool_works() {
    program(&Database::new().await, "absurdctl.sh", &[]).await;
    program(&Database::upstream("0.5.1").await, "absurdctl.sh", &[]).await;
}
