//! Installing: twice at once, again, and what a server refuses.

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
