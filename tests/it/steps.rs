//! A step first looks at its own stored result: what it asked for then may be gone by now.

use std::time::Duration;

use absurd_client::{AbsurdClient, ClaimOptions, ClaimedTask, Reason, RetryOptions, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_proto::v1::await_task_response::Outcome;
use absurd_tests::{Grpc, Server, eventually};
use serde_json::json as j;
use uuid::Uuid;

async fn claim(client: &AbsurdClient) -> ClaimedTask {
    eventually("a task can be claimed", || async { client.claim_task(ClaimOptions::default()).await.unwrap().pop() })
        .await
}

async fn await_task(
    grpc: &mut Grpc,
    claim: &ClaimedTask,
    child: Uuid,
    timeout: Option<i64>,
) -> Result<Outcome, Reason> {
    let request = pb::AwaitTaskRequest {
        queue: "q".into(),
        claim_token: Some(claim.claim_token().to_owned()),
        step_name: "child".into(),
        awaited_queue: "children".into(),
        awaited_task_id: child.to_string(),
        timeout: timeout.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
        ..Default::default()
    };
    let answer = grpc.await_task(request).await;
    answer.map(|answer| answer.into_inner().outcome.unwrap()).map_err(|status| {
        let details = tonic_types::StatusExt::get_error_details(&status);
        match details.error_info().unwrap().reason.as_str() {
            "TASK_NOT_FOUND" => Reason::TaskNotFound,
            "QUEUE_NOT_FOUND" => Reason::QueueNotFound,
            other => panic!("{other}: {status}"),
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_task_that_is_gone_is_remembered() {
    let server = Server::start().await;
    let client = server.client();
    let children = client.with_queue("children".to_owned());
    let mut grpc = server.raw().await;
    let options = SpawnOptions::default().max_attempts(9);
    client.spawn_task("parent", &j!(null), options.clone()).await.unwrap();
    client.spawn_task("impatient", &j!(null), options).await.unwrap();

    children.create_queue().await.unwrap();
    let child = children.spawn_task("child", &j!(null), SpawnOptions::default()).await.unwrap().task_id;
    let parent = claim(&client).await;
    assert!(matches!(await_task(&mut grpc, &parent, child, None).await, Ok(Outcome::Suspended(_))));
    let impatient = claim(&client).await;
    assert!(matches!(await_task(&mut grpc, &impatient, child, Some(0)).await, Ok(Outcome::TimedOut(_))));
    claim(&children).await.complete(&j!({"r": 1})).await.unwrap();
    let parent = claim(&client).await;
    let first = await_task(&mut grpc, &parent, child, None).await.unwrap();
    assert!(matches!(&first, Outcome::Snapshot(json) if json.text.contains("\"r\": 1")), "{first:?}");

    children.cleanup_tasks(Duration::ZERO, None).await.unwrap();
    assert_eq!(children.get_task_status(child).await.unwrap(), None, "the child is gone");
    for gone in ["its task", "its queue"] {
        assert_eq!(await_task(&mut grpc, &parent, child, None).await.as_ref(), Ok(&first), "{gone}");
        assert!(matches!(await_task(&mut grpc, &impatient, child, None).await, Ok(Outcome::TimedOut(_))), "{gone}");
        children.drop_queue().await.unwrap();
    }
    // A later attempt, too; and a step without a result of its own is refused.
    parent.fail(&j!("again")).await.unwrap();
    let later = claim(&client).await;
    assert_eq!(await_task(&mut grpc, &later, child, None).await.as_ref(), Ok(&first));
    client.spawn_task("fresh", &j!(null), SpawnOptions::default()).await.unwrap();
    let fresh = claim(&client).await;
    assert_eq!(await_task(&mut grpc, &fresh, child, None).await, Err(Reason::QueueNotFound));
    children.create_queue().await.unwrap();
    assert_eq!(await_task(&mut grpc, &fresh, child, None).await, Err(Reason::TaskNotFound));
    // The fence holds for what is stored, too.
    let stale = later.claim_token().to_owned();
    later.release(Duration::ZERO).await.unwrap();
    let request = pb::AwaitTaskRequest {
        queue: "q".into(),
        claim_token: Some(stale),
        step_name: "child".into(),
        awaited_queue: "children".into(),
        awaited_task_id: child.to_string(),
        ..Default::default()
    };
    assert_eq!(grpc.await_task(request).await.unwrap_err().code(), tonic::Code::Aborted);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_gone_is_remembered() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions::default().max_attempts(9);
    client.spawn_task("n", &j!(null), options).await.unwrap();
    client.emit_event("paid", &j!({"sum": 7})).await.unwrap();
    let first = claim(&client).await;
    let paid = first.await_event("s", "paid", None).await.unwrap();
    client.cleanup_events(Duration::ZERO, None).await.unwrap();
    assert_eq!(first.await_event("s", "paid", None).await.unwrap(), paid);
    first.fail(&j!("again")).await.unwrap();
    assert_eq!(claim(&client).await.await_event("s", "paid", None).await.unwrap(), paid);
}

/// A copy of a failed task is made once, whatever has become of its source meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_made_once_though_its_source_is_gone() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let source = client.spawn_task("n", &j!({"a": 1}), SpawnOptions::default()).await.unwrap().task_id;
    claim(&client).await.fail(&j!("x")).await.unwrap();
    let retry = pb::RetryTaskRequest {
        queue: "q".into(),
        task_id: source.to_string(),
        spawn_new: true,
        request_id: Some(Uuid::now_v7().to_string()),
        ..Default::default()
    };
    let first = grpc.retry_task(retry.clone()).await.unwrap().into_inner();
    assert_eq!(grpc.retry_task(retry.clone()).await.unwrap().into_inner(), first);
    client.cleanup_tasks(Duration::ZERO, None).await.unwrap();
    assert_eq!(client.get_task_status(source).await.unwrap(), None, "the source is gone");
    assert_eq!(grpc.retry_task(retry).await.unwrap().into_inner(), first);
    let another = client.retry_task(source, RetryOptions { spawn_new: true, ..RetryOptions::default() }).await;
    assert_eq!(another.unwrap_err().reason(), Reason::TaskNotFound);
}
