//! Checkpoints over gRPC: writes are fenced, reads see what they should, pages are complete.

use std::time::Duration;

use absurd_client::{AbsurdClient, ClaimOptions, ClaimedTask, Reason, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_tests::Server;
use serde_json::json as j;
use uuid::Uuid;

async fn claimed(client: &AbsurdClient) -> ClaimedTask {
    client.claim_task(ClaimOptions::default()).await.unwrap().pop().expect("a task is there")
}

async fn spawn(client: &AbsurdClient) -> Uuid {
    let options = SpawnOptions { max_attempts: Some(3), ..SpawnOptions::default() };
    client.spawn_task("n", &j!(null), options).await.unwrap().task_id
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_written_and_read() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let task_id = spawn(&client).await;
    let first = claimed(&client).await;
    assert!(client.set_checkpoint(task_id, "a", &j!({"n": 1}), first.run_id, None).await.unwrap());
    assert!(client.set_checkpoint(task_id, "a", &j!({"n": 1}), first.run_id, None).await.unwrap(), "said twice");
    let before = client.get_run_status(first.run_id).await.unwrap().unwrap().claim_expires_at.unwrap();
    assert!(
        client.set_checkpoint(task_id, "b", &j!(null), first.run_id, Some(Duration::from_secs(600))).await.unwrap()
    );
    let after = client.get_run_status(first.run_id).await.unwrap().unwrap().claim_expires_at.unwrap();
    assert!(after >= before + Duration::from_secs(500), "the lease is extended");
    let read = client.get_checkpoint(task_id, "a", false).await.unwrap().unwrap();
    assert_eq!((read.state.unwrap().as_str(), read.status.as_str()), ("{\"n\": 1}", "committed"));
    assert_eq!(read.owner_run_id, Some(first.run_id));
    assert_eq!(client.get_checkpoint(task_id, "none", false).await.unwrap(), None);
    sql.execute("insert into absurd.c_q (task_id, checkpoint_name, status) values ($1, 'p', 'pending')", &[&task_id])
        .await
        .unwrap();
    assert_eq!(client.get_checkpoint(task_id, "p", false).await.unwrap(), None);
    assert_eq!(client.get_checkpoint(task_id, "p", true).await.unwrap().unwrap().status, "pending");

    // The next attempt sees what the first one stored; the owner's read does not.
    first.fail(&j!({"message": "x"})).await.unwrap();
    let second = claimed(&client).await;
    assert!(client.save_checkpoint_for_run(second.run_id, "c", &j!([1]), None).await.unwrap());
    let names = |all: Vec<absurd_client::Checkpoint>| -> Vec<String> {
        all.into_iter().map(|checkpoint| checkpoint.checkpoint_name).collect()
    };
    assert_eq!(names(client.get_all_checkpoints(task_id, second.run_id).await.unwrap()), ["a", "b", "c"]);
    assert_eq!(names(client.get_all_checkpoints(task_id, first.run_id).await.unwrap()), ["a", "b"]);
    assert_eq!(names(client.get_checkpoints_for_run(second.run_id).await.unwrap()), ["c"]);
    assert!(client.get_run_checkpoint(second.run_id, "c").await.unwrap().is_some());
    assert!(client.get_run_checkpoint(second.run_id, "a").await.unwrap().is_none(), "the first attempt's");

    // An attempt that has ended writes nothing; a newer one's value stays.
    let late = client.set_checkpoint(task_id, "late", &j!(1), first.run_id, None).await.unwrap_err();
    assert!(matches!(late.reason(), Reason::RunNotRunning | Reason::ClaimExpired | Reason::ClaimLost), "{late}");
    assert_eq!(client.get_checkpoint(task_id, "late", false).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_checkpoints_are_refused() {
    let server = Server::start().await;
    let client = server.client();
    let task_id = spawn(&client).await;
    let task = claimed(&client).await;
    let foreign = client.set_checkpoint(Uuid::now_v7(), "s", &j!(1), task.run_id, None).await.unwrap_err();
    assert_eq!((foreign.reason(), foreign.field()), (Reason::InvalidArgument, Some("task_id")), "no orphan is made");
    let foreign = client.get_all_checkpoints(Uuid::now_v7(), task.run_id).await.unwrap_err();
    assert_eq!(foreign.field(), Some("task_id"));
    let blank = client.set_checkpoint(task_id, "  ", &j!(1), task.run_id, None).await.unwrap_err();
    assert_eq!(blank.field(), Some("checkpoint_name"));
    let nul = client.set_checkpoint(task_id, "s", &j!("\u{0}"), task.run_id, None).await.unwrap_err();
    assert_eq!(nul.reason(), Reason::JsonInvalid, "{nul}");
    let unknown = client.get_checkpoints_for_run(Uuid::now_v7()).await.unwrap_err();
    assert_eq!(unknown.reason(), Reason::RunNotFound);
    let unknown = client.save_checkpoint_for_run(Uuid::now_v7(), "s", &j!(1), None).await.unwrap_err();
    assert_eq!(unknown.reason(), Reason::RunNotFound, "never dropped in silence");
    let mut grpc = server.raw().await;
    for (page_size, page_token) in [(1001, ""), (-1, ""), (0, "???"), (0, "bm90IGEgdG9rZW4")] {
        let request = pb::GetAllCheckpointsRequest {
            queue: "q".into(),
            task_id: String::new(),
            run_id: task.run_id.to_string(),
            page_size,
            page_token: page_token.into(),
        };
        assert_eq!(grpc.get_all_checkpoints(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}

/// Pages are cut by number and by size, and together they are all there is, in order, also where times are equal.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_checkpoints_are_complete() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let task_id = spawn(&client).await;
    let task = claimed(&client).await;
    let insert = "insert into absurd.c_q (task_id, checkpoint_name, state, owner_run_id, updated_at)
        select $1, 'step ' || lpad(i::text, 5, '0'), to_jsonb(repeat('x', case when i % 500 = 0 then 900000 else 10 end)),
               $2, now() + (i / 7) * interval '1 ms' from generate_series(1, 2500) i";
    sql.execute(insert, &[&task_id, &task.run_id]).await.unwrap();
    let all = client.get_all_checkpoints(task_id, task.run_id).await.unwrap();
    let expected: Vec<String> = (1..=2500).map(|i| format!("step {i:05}")).collect();
    assert_eq!(all.iter().map(|checkpoint| checkpoint.checkpoint_name.clone()).collect::<Vec<_>>(), expected);
    assert_eq!(client.get_checkpoints_for_run(task.run_id).await.unwrap().len(), 2500);
    let mut grpc = server.raw().await;
    let request = pb::GetCheckpointsForRunRequest {
        queue: "q".into(),
        run_id: task.run_id.to_string(),
        page_size: 7,
        page_token: String::new(),
    };
    let page = grpc.get_checkpoints_for_run(request).await.unwrap().into_inner();
    assert_eq!((page.checkpoints.len(), page.next_page_token.is_empty()), (7, false));
}
