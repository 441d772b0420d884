//! Tracking records of workflow runs.

use std::time::{Duration, SystemTime};

use absurd_client::{Json, NewWorkflowRun, Reason, WorkflowChange, WorkflowFilter, WorkflowStatus, proto as pb};
use absurd_server::store::migrate;
use absurd_tests::{Server, eventually};
use serde_json::json as j;
use uuid::Uuid;

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
            workflow_hash: Some("abc".into()),
            ..NewWorkflowRun::new("order_flow", "v1.2-rc_3")
        })
        .await
        .unwrap();
    let record = client.get_workflow_run(id).await.unwrap().unwrap();
    assert_eq!(record.status, WorkflowStatus::Pending);
    assert_eq!((record.workflow_name.as_str(), record.absurd_queue.as_str()), ("order_flow", "q"));
    assert_eq!(record.inputs.unwrap().as_str(), "{\"order\": 1}");
    assert_eq!((record.tags, record.result, record.started_at), (None, None, None));
    assert_eq!(record.absurd_run_id, Some(run));

    let began = SystemTime::now();
    let running = WorkflowChange { started_at: Some(began), task_count: Some(3), ..WorkflowChange::default() };
    assert!(client.update_workflow_run_status(id, WorkflowStatus::Running, running.clone()).await.unwrap());
    assert!(client.update_workflow_run_status(id, WorkflowStatus::Running, running).await.unwrap(), "said twice");
    let ended = WorkflowChange {
        result: Some(Json::null()),
        completed_at: Some(began + Duration::from_secs(5)),
        ..WorkflowChange::default()
    };
    assert!(client.update_workflow_run_status(id, WorkflowStatus::Completed, ended).await.unwrap());
    let record = client.get_workflow_run(id).await.unwrap().unwrap();
    assert_eq!((record.status, record.task_count), (WorkflowStatus::Completed, Some(3)), "what is absent stays");
    assert_eq!(record.result.unwrap(), Json::null());
    assert_eq!(record.completed_at.unwrap(), record.started_at.unwrap() + Duration::from_secs(5));

    assert!(
        !client
            .update_workflow_run_status(Uuid::new_v4(), WorkflowStatus::Failed, WorkflowChange::default())
            .await
            .unwrap()
    );
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
    let all = server.client().list_workflow_runs(WorkflowFilter::default()).await.unwrap();
    assert_eq!(all.items.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_records_are_refused() {
    let server = Server::start().await;
    let client = server.client();
    let text = |value: serde_json::Value| Some(Json::of(&value).unwrap());
    for (wrong, field) in [
        (NewWorkflowRun::new("Order", "1"), "workflow_name"),
        (NewWorkflowRun::new("a__b", "1"), "workflow_name"),
        (NewWorkflowRun::new("a\n", "1"), "workflow_name"),
        (NewWorkflowRun::new("", "1"), "workflow_name"),
        (NewWorkflowRun::new("a", "1__2"), "workflow_version"),
        (NewWorkflowRun::new("a", ""), "workflow_version"),
        (NewWorkflowRun { created_by: Some("x".repeat(201)), ..NewWorkflowRun::new("a", "1") }, "created_by"),
    ] {
        let error = client.create_workflow_run(wrong).await.unwrap_err();
        assert_eq!((error.reason(), error.field()), (Reason::InvalidArgument, Some(field)), "{error}");
    }
    for wrong in [
        NewWorkflowRun { inputs: text(j!([1])), ..NewWorkflowRun::new("a", "1") },
        NewWorkflowRun { inputs: Some(Json::from_text("{")), ..NewWorkflowRun::new("a", "1") },
    ] {
        assert_eq!(client.create_workflow_run(wrong).await.unwrap_err().reason(), Reason::JsonInvalid);
    }
    let negative = WorkflowChange { task_count: Some(-1), ..WorkflowChange::default() };
    assert_eq!(
        client.update_workflow_run_status(Uuid::new_v4(), WorkflowStatus::Failed, negative).await.unwrap_err().field(),
        Some("task_count")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_filtered_and_paged() {
    let server = Server::start().await;
    let client = server.client();
    let mut ids = Vec::new();
    for index in 0..25 {
        let name = if index < 20 { "many" } else { "few" };
        let team = if index % 2 == 0 { "a" } else { "b" };
        let record = NewWorkflowRun::new(name, format!("v{}", index % 3)).tag("team", team).tag("n", index);
        ids.push(client.create_workflow_run(record).await.unwrap());
    }
    client.update_workflow_run_status(ids[3], WorkflowStatus::Failed, WorkflowChange::default()).await.unwrap();
    let list = async |filter: WorkflowFilter| client.list_workflow_runs(filter).await.unwrap();
    let all = || WorkflowFilter::default();

    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let page = list(WorkflowFilter { page_size: 7, page_token, ..all() }).await;
        seen.extend(page.items.into_iter().map(|record| record.workflow_run_id));
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    seen.reverse();
    assert_eq!(seen, ids, "newest first, each once");

    let count = async |filter| list(filter).await.items.len();
    assert_eq!(count(WorkflowFilter { workflow_name: Some("few".into()), ..all() }).await, 5);
    assert_eq!(count(WorkflowFilter { workflow_version: Some("v1".into()), ..all() }).await, 8);
    assert_eq!(count(WorkflowFilter { status: Some(WorkflowStatus::Failed), ..all() }).await, 1);
    let tags = serde_json::Map::from_iter([("team".to_owned(), j!("b"))]);
    assert_eq!(count(WorkflowFilter { tags, ..all() }).await, 12);
    let made = client.get_workflow_run(ids[10]).await.unwrap().unwrap().created_at;
    assert_eq!(count(WorkflowFilter { created_before: made, ..all() }).await, 10);
    assert_eq!(count(WorkflowFilter { created_from: made, ..all() }).await, 15);
    let wrong = client.list_workflow_runs(WorkflowFilter { page_token: "x".into(), ..all() }).await;
    assert_eq!(wrong.unwrap_err().field(), Some("page_token"));
}
