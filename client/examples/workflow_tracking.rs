//! Workflow tracking: a record of a pipeline, with the tasks that belong to it.
//! `cargo run -p absurd-client --example workflow_tracking`

use std::time::SystemTime;

use absurd_client::blocking::AbsurdClient;
use absurd_client::{ClaimOptions, Json, NewWorkflowRun, SpawnOptions, WorkflowChange, WorkflowFilter, WorkflowStatus};
use serde_json::{Value, json};

fn main() -> anyhow::Result<()> {
    let client = AbsurdClient::new(Some("workflow_tracking_queue"), None)?;
    client.create_queue()?;
    let record = NewWorkflowRun::new("data_pipeline", "1.0.0")
        .inputs(json!({"source": "s3://bucket/data", "target": "warehouse"}))
        .created_by("pipeline_system")
        .tag("environment", "production")
        .tag("priority", "high");
    let pipeline = client.create_workflow_run(record)?;
    let began = WorkflowChange { started_at: Some(SystemTime::now()), ..WorkflowChange::default() };
    client.update_workflow_run_status(pipeline, WorkflowStatus::Running, began)?;

    // The task carries the record's id in its headers.
    let options = SpawnOptions::default().workflow_run(pipeline);
    client.spawn_task("extract_data", &json!({"source": "s3://bucket/data"}), options)?;

    for task in client.claim_task(ClaimOptions::default())? {
        let headers: Value = task.headers.as_ref().map(Json::to).transpose()?.unwrap_or_default();
        println!("{} belongs to the pipeline: {}", task.task_name, headers["workflow_run_id"] == json!(pipeline));
        let params: Value = task.params()?;
        let result = json!({"processed": format!("data from {}", params["source"].as_str().unwrap_or_default())});
        client.complete_task(task.run_id, &result)?;
        let ended = WorkflowChange {
            result: Some(result.into()),
            completed_at: Some(SystemTime::now()),
            task_count: Some(1),
            ..WorkflowChange::default()
        };
        client.update_workflow_run_status(pipeline, WorkflowStatus::Completed, ended)?;
    }

    let mut filter = WorkflowFilter { status: Some(WorkflowStatus::Completed), ..WorkflowFilter::default() };
    filter.tags.insert("environment".into(), "production".into());
    for record in client.list_workflow_runs(filter)?.items {
        let result = record.result.map(|result| result.to_string()).unwrap_or_default();
        println!("{} {} is {:?}: {result}", record.workflow_name, record.workflow_version, record.status);
    }
    Ok(())
}
