//! Tracking records of workflow runs.

use std::time::{Duration, SystemTime};

use absurd_client::{Json, NewWorkflowRun, Reason, WorkflowChange, proto as pb};
use absurd_server::store::migrate;
use absurd_tests::{Server, eventually};
use serde_json::json as j;
use uuid::Uuid;

fn new(name: &str, version: &str) -> NewWorkflowRun {
    NewWorkflowRun { workflow_name: name.into(), workflow_version: version.into(), ..NewWorkflowRun::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_is_made_changed_and_read() {
    let server = Server::start().await;
    let client = server.client();
    let run = Uuid::now_v7();
    let id = client
        .create_workflow_run(NewWorkflowRun {
            inputs: Some(Json::of(&j!({"order": 1})).unwrap()),
            absurd_run_id: Some(run),
            created_by: Some("me".into()),
            tags: Some(Json::of(&j!({})).unwrap()),
            workflow_hash: Some("abc".into()),
            ..new("order_flow", "v1.2-rc_3")
        })
        .await
        .unwrap();
    let record = client.get_workflow_run(id).await.unwrap().unwrap();
    assert_eq!(record.status(), pb::WorkflowStatus::Pending);
    assert_eq!((record.workflow_name.as_str(), record.absurd_queue.as_str()), ("order_flow", "q"));
    assert_eq!(record.inputs.unwrap().text, "{\"order\": 1}");
    assert_eq!((record.tags, record.result, record.started_at), (None, None, None), "an empty object is none");
    assert_eq!(record.absurd_run_id, Some(run.to_string()));

    let began = SystemTime::now();
    let running = WorkflowChange {
        status: Some(pb::WorkflowStatus::Running),
        started_at: Some(began),
        task_count: Some(3),
        ..WorkflowChange::default()
    };
    assert!(client.update_workflow_run_status(id, running.clone()).await.unwrap());
    assert!(client.update_workflow_run_status(id, running).await.unwrap(), "said twice");
    let ended = WorkflowChange {
        status: Some(pb::WorkflowStatus::Completed),
        result: Some(Json::null()),
        completed_at: Some(began + Duration::from_secs(5)),
        ..WorkflowChange::default()
    };
    assert!(client.update_workflow_run_status(id, ended).await.unwrap());
    let record = client.get_workflow_run(id).await.unwrap().unwrap();
    assert_eq!((record.status(), record.task_count), (pb::WorkflowStatus::Completed, Some(3)), "what is absent stays");
    assert_eq!(record.result.unwrap().text, "null");
    assert_eq!(record.completed_at.unwrap().seconds - record.started_at.unwrap().seconds, 5);

    assert!(!client.update_workflow_run_status(Uuid::new_v4(), WorkflowChange::default()).await.unwrap());
    assert_eq!(client.get_workflow_run(Uuid::new_v4()).await.unwrap(), None);

    // What is stored is not thrown away by accident.
    let config = server.database().url().parse().unwrap();
    let database = server.database().clone();
    server.stop().await;
    let refused = eventually("the server has signed off", || async {
        let error = migrate::remove(&config, false).await.unwrap_err().to_string();
        (!error.contains("a server runs")).then_some(error)
    })
    .await;
    assert!(refused.contains("workflow runs are stored"), "{refused}");
    migrate::remove(&config, true).await.unwrap();
    let gone = "select to_regnamespace('absurd_server') is null";
    assert!(database.connect().await.query_one(gone, &[]).await.unwrap().get::<_, bool>(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_creation_makes_one_record() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let request = pb::CreateWorkflowRunRequest {
        queue: "q".into(),
        workflow_run_id: Uuid::new_v4().to_string(),
        workflow_name: "a".into(),
        workflow_version: "1".into(),
        ..Default::default()
    };
    for _ in 0..2 {
        let answer = grpc.create_workflow_run(request.clone()).await.unwrap().into_inner();
        assert_eq!(answer.workflow_run_id, request.workflow_run_id);
    }
    let other = pb::CreateWorkflowRunRequest { workflow_name: "b".into(), ..request };
    assert!(grpc.create_workflow_run(other).await.unwrap_err().message().contains("another workflow run"));
    let (all, _) = server.client().list_workflow_runs(pb::ListWorkflowRunsRequest::default()).await.unwrap();
    assert_eq!(all.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_records_are_refused() {
    let server = Server::start().await;
    let client = server.client();
    let text = |value: serde_json::Value| Some(Json::of(&value).unwrap());
    for (wrong, field) in [
        (new("Order", "1"), "workflow_name"),
        (new("a__b", "1"), "workflow_name"),
        (new("a\n", "1"), "workflow_name"),
        (new("", "1"), "workflow_name"),
        (new("a", "1__2"), "workflow_version"),
        (new("a", ""), "workflow_version"),
        (NewWorkflowRun { created_by: Some("x".repeat(201)), ..new("a", "1") }, "created_by"),
    ] {
        let error = client.create_workflow_run(wrong).await.unwrap_err();
        assert_eq!((error.reason(), error.field()), (Reason::InvalidArgument, Some(field)), "{error}");
    }
    for wrong in [
        NewWorkflowRun { inputs: text(j!([1])), ..new("a", "1") },
        NewWorkflowRun { tags: text(j!("x")), ..new("a", "1") },
        NewWorkflowRun { tags: Some(Json::from_text("{")), ..new("a", "1") },
    ] {
        assert_eq!(client.create_workflow_run(wrong).await.unwrap_err().reason(), Reason::JsonInvalid);
    }
    let negative = WorkflowChange { task_count: Some(-1), ..WorkflowChange::default() };
    assert_eq!(
        client.update_workflow_run_status(Uuid::new_v4(), negative).await.unwrap_err().field(),
        Some("task_count")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_filtered_and_paged() {
    let server = Server::start().await;
    let client = server.client();
    let mut ids = Vec::new();
    for index in 0..25 {
        let tags = Some(Json::of(&j!({"team": if index % 2 == 0 { "a" } else { "b" }, "n": index})).unwrap());
        let record =
            NewWorkflowRun { tags, ..new(if index < 20 { "many" } else { "few" }, &format!("v{}", index % 3)) };
        ids.push(client.create_workflow_run(record).await.unwrap());
    }
    let failed = WorkflowChange { status: Some(pb::WorkflowStatus::Failed), ..WorkflowChange::default() };
    client.update_workflow_run_status(ids[3], failed).await.unwrap();
    let list = async |request: pb::ListWorkflowRunsRequest| client.list_workflow_runs(request).await.unwrap();
    let all = || pb::ListWorkflowRunsRequest::default();

    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let (page, next) = list(pb::ListWorkflowRunsRequest { page_size: 7, page_token, ..all() }).await;
        seen.extend(page.into_iter().map(|record| record.workflow_run_id.parse::<Uuid>().unwrap()));
        if next.is_empty() {
            break;
        }
        page_token = next;
    }
    seen.reverse();
    assert_eq!(seen, ids, "newest first, each once");

    let count = async |request| list(request).await.0.len();
    assert_eq!(count(pb::ListWorkflowRunsRequest { workflow_name: "few".into(), ..all() }).await, 5);
    assert_eq!(count(pb::ListWorkflowRunsRequest { workflow_version: "v1".into(), ..all() }).await, 8);
    assert_eq!(count(pb::ListWorkflowRunsRequest { status: pb::WorkflowStatus::Failed.into(), ..all() }).await, 1);
    let tags = Some(pb::Json { text: "{\"team\": \"b\"}".into() });
    assert_eq!(count(pb::ListWorkflowRunsRequest { tags, ..all() }).await, 12);
    let made = client.get_workflow_run(ids[10]).await.unwrap().unwrap().created_at;
    assert_eq!(count(pb::ListWorkflowRunsRequest { created_before: made, ..all() }).await, 10);
    assert_eq!(count(pb::ListWorkflowRunsRequest { created_from: made, ..all() }).await, 15);
    let wrong = client.list_workflow_runs(pb::ListWorkflowRunsRequest { page_token: "x".into(), ..all() }).await;
    assert_eq!(wrong.unwrap_err().field(), Some("page_token"));
}
