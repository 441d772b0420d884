//! Queues are made: who made one, and which names meet another queue's tables.

use absurd_client::{ClaimOptions, Reason, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_server::settings::Settings;
use absurd_tests::{Database, Server, ServerOptions};
use serde_json::json as j;

#[tokio::test(flavor = "multi_thread")]
async fn of_many_creators_one_has_made_the_queue() {
    let database = Database::new().await;
    let servers = [Server::start_on(&database).await, Server::start_on(&database).await];
    for (round, mode) in ["", "partitioned", "with a policy"].into_iter().cycle().take(6).enumerate() {
        let asked = (0..12).map(|caller: usize| {
            let mut request = pb::CreateQueueRequest { queue: format!("race {round}"), ..Default::default() };
            match mode {
                "partitioned" => request.set_storage_mode(pb::StorageMode::Partitioned),
                "with a policy" => request.policy = Some(pb::QueuePolicy { cleanup_limit: 7, ..Default::default() }),
                _ => {}
            }
            let server = &servers[caller % 2];
            async move { server.raw().await.create_queue(request).await.unwrap().into_inner().created }
        });
        let told = futures_util::future::join_all(asked).await;
        assert_eq!(told.iter().filter(|created| **created).count(), 1, "{mode}: {told:?}");
    }
}

/// Every name that is taken in the schema, with and without the letter of its kind, is refused as a queue's or makes one that
/// works: on our database and on upstream's.
#[tokio::test(flavor = "multi_thread")]
async fn no_name_of_a_queue_breaks_on_another_queues_relations() {
    for adopted in [false, true] {
        let database = match adopted {
            false => Database::new().await,
            true => {
                let database = Database::upstream("0.5.1").await;
                let options = absurd_server::store::migrate::Options::default();
                absurd_server::store::migrate::migrate(&database.url().parse().unwrap(), options).await.unwrap();
                database
            }
        };
        let options = ServerOptions { settings: Settings::default(), ..ServerOptions::default() };
        let server = Server::start_with(database, options).await;
        let sql = server.database().connect().await;
        sql.batch_execute("select absurd.create_queue('base'), absurd.create_queue('part', 'partitioned')")
            .await
            .unwrap();
        let relations = sql
            .query(
                "select distinct substr(relname, 3) from pg_class
                  where relnamespace = 'absurd'::regnamespace and relname ~ '^[trcewi]_(base|part)_'",
                &[],
            )
            .await
            .unwrap();
        let names: Vec<String> = relations.iter().map(|row| row.get(0)).collect();
        assert!(names.len() > 30 && names.contains(&"part_d_pkey".to_owned()), "{names:?}");
        let (mut made, mut refused) = (0, 0);
        for name in names {
            let client = server.client().with_queue(name.clone());
            match client.create_queue().await {
                Ok(created) => {
                    assert!(created, "{name}");
                    client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
                    let claims = client.claim_task(ClaimOptions::default()).await.unwrap();
                    claims[0].complete(&j!(1)).await.unwrap();
                    client.drop_queue().await.unwrap();
                    made += 1;
                }
                Err(error) => {
                    assert_eq!(
                        (error.reason(), error.field()),
                        (Reason::InvalidArgument, Some("queue")),
                        "{name}: {error}"
                    );
                    refused += 1;
                }
            }
        }
        assert!(refused > 30, "{refused} refused, {made} made");
        for queue in ["base", "part"] {
            let client = server.client().with_queue(queue.to_owned());
            client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
        }
    }
}
