//! Installing: twice at once, again, and what a server refuses.

use absurd_server::app::App;
use absurd_server::settings::{Secret, Settings};
use absurd_server::store::migrate::{self, Options, Origin};
use absurd_tests::{Database, ServerOptions};

#[tokio::test(flavor = "multi_thread")]
async fn two_migrations_at_once_install_once() {
    let database = Database::empty().await;
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let (one, two) =
        tokio::join!(migrate::migrate(&config, Options::default()), migrate::migrate(&config, Options::default()));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!((one.origin, two.origin), (Origin::Ours, Origin::Ours));
    assert_ne!(one.applied.is_empty(), two.applied.is_empty(), "one installs, the other finds it done");
    let again = migrate::migrate(&config, Options::default()).await.unwrap();
    assert!(again.applied.is_empty());
    let sql = database.connect().await;
    let queues = sql.query("select * from absurd.list_queues()", &[]).await.unwrap();
    assert!(queues.is_empty(), "a fresh installation registers no queue");
    let version: String = sql.query_one("select absurd.get_schema_version()", &[]).await.unwrap().get(0);
    assert_eq!(version, "0.5.1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_needs_a_newer_server_is_refused() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.execute("update absurd_server.migration set min_server = 99", &[]).await.unwrap();
    let refused = migrate::migrate(&database.url().parse().unwrap(), Options::default()).await.unwrap_err();
    assert!(format!("{refused:?}").contains("generation 99"), "{refused:?}");
}

/// A newer server has been here and lets older ones run: this one changes nothing, whatever the checksums say.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_server_never_puts_its_text_over_a_newer_one() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute(
        "insert into absurd_server.migration (version, name, checksum, min_server)
         select max(version) + 1, '99.0.0', 'another', max(min_server) from absurd_server.migration;
         update absurd_server.setting set value = '99' where name = 'contract_version';
         update absurd_server.setting set value = 'another' where name = 'contract_checksum';
         create or replace function absurd_server.is_empty(p_table text) returns boolean language sql as 'select null::boolean';
         create or replace function absurd.get_schema_version() returns text language sql as 'select ''99''::text'",
    )
    .await
    .unwrap();
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    for report in [
        migrate::check(&config, Options::default()).await.unwrap(),
        migrate::migrate(&config, Options::default()).await.unwrap(),
    ] {
        assert!(report.applied.is_empty(), "{report:?}");
    }
    let server = absurd_tests::Server::start_on(&database).await;
    let kept = "select absurd_server.is_empty('t_q') is null and absurd.get_schema_version() = '99'
                   and (select value from absurd_server.setting where name = 'contract_checksum') = 'another'";
    assert!(sql.query_one(kept, &[]).await.unwrap().get::<_, bool>(0));
    server.stop().await;
}

/// A server on schemas that are older than its own says what to do, and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_start_on_an_older_schema() {
    let database = Database::new().await;
    let sql = database.connect().await;
    for (older, named) in [
        (
            "update absurd_server.setting set value = '1' where name = 'contract_version'",
            "storage contract (version 1 to",
        ),
        ("update absurd_server.migration set version = 3", "side schema (version 3 to"),
    ] {
        sql.batch_execute(older).await.unwrap();
        let settings = Settings { database_url: Some(Secret::from(database.url())), ..Settings::default() };
        let refused = App::start(settings.into_app_options().unwrap()).await.unwrap_err();
        let refused = format!("{refused:#}");
        assert!(refused.contains(named) && refused.contains("absurd migrate"), "{refused}");
    }
    let report = migrate::migrate(&database.url().parse().unwrap(), Options::default()).await.unwrap();
    assert_eq!(report.applied.len(), 2, "{report:?}");
    absurd_tests::Server::start_on(&database).await.stop().await;
}

/// A newer server migrates while this one runs, and does not let it run on: its streams end politely, and the process ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_outdated_replica_drains_itself() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.execute("select absurd.create_queue('q')", &[]).await.unwrap();
    let mut command = absurd_tests::absurd(&["serve", "--listen", "127.0.0.1:0"]);
    command.env("ABSURD_DATABASE_URL", database.url()).env("NO_COLOR", "1");
    let mut server = absurd_tests::Absurd::start(command);
    let serving = server.line("serving").await;
    let address = serving.split("listen=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let mut client = absurd_tests::raw(&format!("http://{address}")).await;
    let (_, mut messages) = crate::streams::open(&mut client, crate::streams::request(1)).await;
    sql.execute("update absurd_server.migration set min_server = 99", &[]).await.unwrap();
    let ending = async {
        while let Some(message) = messages.message().await.unwrap() {
            if let Some(absurd_proto::v1::claim_stream_response::Message::Ending(ending)) = message.message {
                return ending.reason();
            }
        }
        panic!("the stream ended without a word");
    };
    let reason = absurd_tests::in_time("the stream ends", ending).await;
    assert_eq!(reason, absurd_proto::v1::EndReason::ServerShutdown);
    server.line("must be upgraded").await;
    assert_eq!(server.exit_code().await, Some(1));
}

/// Each release's schemas, as they are kept in the tree, become this version's.
#[tokio::test(flavor = "multi_thread")]
async fn every_release_is_upgraded() {
    let releases = absurd_tests::root().join("server/sql/releases");
    let mut known = 0;
    for release in std::fs::read_dir(releases).unwrap().map(|entry| entry.unwrap().path()) {
        let read = |name: &str| std::fs::read_to_string(release.join(name)).unwrap();
        let database = Database::empty().await;
        let sql = database.connect().await;
        sql.batch_execute(&format!("set client_min_messages = warning; {}{}", read("contract.sql"), read("side.sql")))
            .await
            .unwrap_or_else(|error| panic!("{}: {error:?}", release.display()));
        sql.batch_execute(&read("versions.sql")).await.unwrap();
        sql.execute("select absurd.create_queue('q')", &[]).await.unwrap();
        sql.execute("select absurd.spawn_task('q', 'n', '1')", &[]).await.unwrap();
        migrate::migrate(&database.url().parse().unwrap(), Options::default()).await.unwrap();
        let server = absurd_tests::Server::start_on(&database).await;
        let claimed = server.client().claim_task(absurd_client::ClaimOptions::default()).await.unwrap();
        assert_eq!(claimed.len(), 1, "{}", release.display());
        server.stop().await;
        known += 1;
    }
    assert!(known > 0, "releases are kept in the tree");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doorbell_is_taken_down_and_hung_again() {
    let server = absurd_tests::Server::start_with(Database::new().await, ServerOptions::default()).await;
    let sql = server.database().connect().await;
    let config = server.database().url().parse().unwrap();
    let triggers = || async {
        let row = sql.query_one("select count(*) from pg_trigger where tgname = 'absurd_server_doorbell'", &[]);
        row.await.unwrap().get::<_, i64>(0)
    };
    assert_eq!(triggers().await, 2);
    let off = migrate::migrate(&config, Options { no_doorbell: true, doorbell: false }).await.unwrap();
    assert_eq!((off.doorbell, triggers().await), (false, 0));
    let on = migrate::migrate(&config, Options { no_doorbell: false, doorbell: true }).await.unwrap();
    assert_eq!((on.doorbell, triggers().await), (true, 2));
}
