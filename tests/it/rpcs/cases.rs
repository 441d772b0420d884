//! The table: for each RPC requests that succeed, with what saying them again brings, and one for each reason of its comment.

use serde_json::{Value as Json, json as j};
use uuid::Uuid;

use super::world::Made;

/// What saying it again brings.
pub(super) enum Again {
    /// The same answer.
    Same,
    /// The same answer but for these fields.
    But(Json),
    /// This refusal.
    Refused(&'static str),
    /// Another effect, as the comment says.
    Anew,
}

pub(super) enum Expected {
    Done(Again),
    Refused(&'static str),
}

/// One request: `$queue`, `$task`, `$run`, `$token` stand for what was made, `$new` and `$v4` for ids.
pub(super) struct Case {
    pub(super) rpc: &'static str,
    pub(super) kind: &'static str,
    pub(super) request: Json,
    pub(super) expected: Expected,
}

/// Calls about a held run: what each needs beside the run, and what a repetition of its success brings.
fn held() -> Vec<(&'static str, Json, Again)> {
    let slept = || j!({"step_name": "s", "event_name": "e", "timeout": "3600s"});
    vec![
        ("CompleteTask", j!({"result": {"text": "1"}}), Again::But(j!({"replayed": true}))),
        ("FailTask", j!({"reason": {"text": "{}"}}), Again::But(j!({"outcome": {"replayed": true}}))),
        ("ExtendClaim", j!({"extend_by": "60s"}), Again::Anew),
        ("SetCheckpoint", j!({"checkpoint_name": "s", "state": {"text": "1"}}), Again::Same),
        ("SaveCheckpointForRun", j!({"checkpoint_name": "s", "data": {"text": "1"}}), Again::Same),
        ("AwaitEvent", slept(), Again::Same),
        ("WaitForEvent", slept(), Again::Same),
        ("AwaitTask", j!({"step_name": "s", "awaited_queue": "q", "awaited_task_id": "$elsewhere"}), Again::Same),
        ("SetRunSleeping", j!({"event_name": "e"}), Again::Same),
        ("Sleep", j!({"step_name": "s", "duration": "3600s"}), Again::Same),
        ("ScheduleTask", j!({"wake_at": "2100-01-01T00:00:00Z"}), Again::Same),
    ]
}

pub(super) fn merged(base: &Json, more: &Json) -> Json {
    let mut merged = base.clone();
    for (name, value) in more.as_object().unwrap() {
        let nested = value.is_object() && merged[name].is_object();
        merged[name] = if nested { self::merged(&merged[name], value) } else { value.clone() };
    }
    merged
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut done = |rpc, kind, request: Json, again| {
        cases.push(Case {
            rpc,
            kind,
            request: merged(&j!({"queue": "$queue"}), &request),
            expected: Expected::Done(again),
        });
    };
    for (rpc, more, again) in held() {
        done(rpc, "running", merged(&j!({"claim_token": "$token"}), &more), again);
    }
    done(
        "CreateQueue",
        "",
        j!({"queue": "$queue-2", "policy": {"cleanup_limit": 5}}),
        Again::But(j!({"created": false})),
    );
    done("DropQueue", "pending", j!({}), Again::But(j!({"dropped": false})));
    for rpc in ["GetQueueStats", "GetQueuePolicy", "ListTasks"] {
        done(rpc, "running", j!({}), Again::Same);
    }
    done("SetQueuePolicy", "", j!({"cleanup_limit": 5, "cleanup_ttl": "60s"}), Again::Same);
    done("CleanupTasks", "completed", j!({"ttl": "0s"}), Again::But(j!({"deleted": 0})));
    done("CleanupEvents", "", j!({"ttl": "0s"}), Again::Same);
    let task = j!({"task_name": "n", "params": {"text": "1"}, "headers": {"text": "{}"}, "task_id": "$new",
        "retry_strategy": {"kind": "RETRY_KIND_FIXED", "base": "1s"}, "cancellation": {"max_delay": "60s"},
        "max_attempts": 2, "workflow_run_id": "$v4", "delay": "5s"});
    done("SpawnTask", "", j!({"task": task}), Again::Same);
    done(
        "SpawnTask",
        "",
        j!({"task": {"task_name": "n", "idempotency_key": "k"}}),
        Again::But(j!({"task": {"created": false}})),
    );
    done("SpawnTask", "", j!({"task": {"task_name": "n"}}), Again::Anew);
    done("SpawnTasks", "", j!({"tasks": [task]}), Again::Same);
    done("ClaimStream", "", j!({"worker_id": "w", "session_id": "s"}), Again::Anew);
    done("DrainWorker", "", j!({"session_id": "s"}), Again::Same);
    done("ClaimTask", "pending", j!({"worker_id": "w", "task_names": ["n"]}), Again::Anew);
    let claim = j!({"claim_token": "$token"});
    done("SettleTasks", "running", j!({"items": [merged(&claim, &j!({"complete": {}}))]}), Again::Anew);
    done("ExtendClaims", "running", j!({"claims": [claim], "extend_by": "60s"}), Again::Anew);
    done("ReleaseClaims", "running", j!({"claims": [claim], "delay": "60s"}), Again::Same);
    done("GetCheckpoint", "pending", j!({"task_id": "$task", "checkpoint_name": "s"}), Again::Same);
    done("GetAllCheckpoints", "pending", j!({"task_id": "$task", "run_id": "$run"}), Again::Same);
    done("GetCheckpointsForRun", "pending", j!({"run_id": "$run"}), Again::Same);
    done("GetRunCheckpoint", "pending", j!({"run_id": "$run", "checkpoint_name": "s"}), Again::Same);
    done("EmitEvent", "", j!({"event_name": "e", "payload": {"text": "1"}}), Again::But(j!({"applied": false})));
    done("CancelTask", "running", j!({"task_id": "$task"}), Again::But(j!({"cancelled": false})));
    done("CancelTask", "pending", j!({"run_id": "$run"}), Again::But(j!({"cancelled": false})));
    done("RetryTask", "failed", j!({"task_id": "$task", "request_id": "$new"}), Again::Same);
    done("RetryTask", "failed", j!({"task_id": "$task", "request_id": "$new", "spawn_new": true}), Again::Same);
    done("RetryTask", "failed", j!({"task_id": "$task"}), Again::Refused("TASK_NOT_FAILED"));
    for rpc in ["GetTaskStatus", "GetTaskResult", "AwaitTaskResult"] {
        done(rpc, "completed", j!({"task_id": "$task"}), Again::Same);
    }
    done("ListRuns", "running", j!({"task_id": "$task"}), Again::Same);
    done("ListWaits", "running", j!({"task_id": "$task"}), Again::Same);
    done("ListWaits", "", j!({"event_name": "e"}), Again::Same);
    done("Find", "running", j!({"text": "$task"}), Again::Same);
    done("GetRunStatus", "running", j!({"run_id": "$run"}), Again::Same);
    let workflow = j!({"workflow_run_id": "$v4", "workflow_name": "a", "workflow_version": "1", "inputs": {"text": "{}"},
        "tags": {"text": "{\"a\": 1}"}});
    done("CreateWorkflowRun", "", workflow, Again::Same);
    let mut bare = |rpc, request: Json, again| {
        cases.push(Case { rpc, kind: "", request, expected: Expected::Done(again) });
    };
    let update =
        j!({"workflow_run_id": "$v4", "status": "WORKFLOW_STATUS_FAILED", "error": {"text": "1"}, "task_count": 1});
    bare("UpdateWorkflowRunStatus", update, Again::Same);
    bare("GetWorkflowRun", j!({"workflow_run_id": "$v4"}), Again::Same);
    bare("ListWorkflowRuns", j!({"workflow_name": "zz", "tags": {"text": "{}"}}), Again::Same);
    bare("ListQueues", j!({"page_size": 1}), Again::Same);
    refusals(&mut cases);
    cases
}

fn refusals(cases: &mut Vec<Case>) {
    let mut no = |rpc, kind, request: Json, reason| {
        let request = merged(&j!({"queue": "$queue"}), &request);
        cases.push(Case { rpc, kind, request, expected: Expected::Refused(reason) });
    };
    for (rpc, more, _) in held() {
        let of = |part: Json| merged(&more, &part);
        let token = || of(j!({"claim_token": "$token"}));
        no(rpc, "", of(j!({"run_id": "x"})), "INVALID_ARGUMENT");
        no(rpc, "", of(j!({"claim_token": "garbage"})), "CLAIM_TOKEN_INVALID");
        no(rpc, "", of(j!({"queue": "nowhere", "run_id": "$new"})), "QUEUE_NOT_FOUND");
        no(rpc, "", of(j!({"run_id": "$new"})), "RUN_NOT_FOUND");
        no(rpc, "lost", token(), "CLAIM_LOST");
        no(rpc, "expired", token(), "CLAIM_EXPIRED");
        no(rpc, "cancelled", token(), "TASK_CANCELLED");
        // Without a token only the state counts, and the storage contract lets completed runs write checkpoints
        // (`tests/it/contract/checkpoints.sql`).
        match rpc {
            "CompleteTask" => no(rpc, "pending", of(j!({"run_id": "$run"})), "RUN_NOT_RUNNING"),
            "SetCheckpoint" | "SaveCheckpointForRun" => no(rpc, "completed", token(), "RUN_NOT_RUNNING"),
            _ => no(rpc, "completed", of(j!({"run_id": "$run"})), "RUN_NOT_RUNNING"),
        }
    }
    let large = format!("\"{}\"", "x".repeat(1024 * 1024));
    for (rpc, field, more) in [
        ("CompleteTask", "result", j!({})),
        ("SetCheckpoint", "state", j!({"checkpoint_name": "s"})),
        ("SaveCheckpointForRun", "data", j!({"checkpoint_name": "s"})),
    ] {
        let with = |text: &str| merged(&more, &j!({"claim_token": "$token", field: {"text": text}}));
        no(rpc, "running", with("{"), "JSON_INVALID");
        no(rpc, "running", with(&large), "PAYLOAD_TOO_LARGE");
    }
    let task = |more: Json| merged(&j!({"task_name": "n"}), &more);
    for (wrong, reason) in [
        (task(j!({"max_attempts": 0})), "INVALID_ARGUMENT"),
        (task(j!({"workflow_run_id": "x"})), "INVALID_ARGUMENT"),
        (task(j!({"params": {"text": "\"\\u0000\""}})), "JSON_INVALID"),
        (task(j!({"params": {"text": large}})), "PAYLOAD_TOO_LARGE"),
        (task(j!({"task_id": "$task"})), "TASK_ID_CONFLICT"),
    ] {
        let kind = if reason == "TASK_ID_CONFLICT" { "pending" } else { "" };
        let wrong = if kind.is_empty() { wrong } else { merged(&wrong, &j!({"task_name": "another"})) };
        no("SpawnTask", kind, j!({"task": wrong}), reason);
        no("SpawnTasks", kind, j!({"tasks": [task(j!({})), wrong]}), reason);
    }
    no("SpawnTask", "", j!({"queue": "nowhere", "task": task(j!({}))}), "QUEUE_NOT_FOUND");
    no("SpawnTasks", "", j!({"queue": "nowhere", "tasks": [task(j!({}))]}), "QUEUE_NOT_FOUND");
    for (rpc, wrong) in [
        ("CreateQueue", j!({"queue": ""})),
        ("CreateQueue", j!({"queue": "fresh", "policy": {"cleanup_limit": -1}})),
        ("DropQueue", j!({"queue": ""})),
        ("GetQueueStats", j!({"queue": ""})),
        ("GetQueuePolicy", j!({"queue": ""})),
        ("SetQueuePolicy", j!({"cleanup_limit": 0})),
        ("CleanupTasks", j!({})),
        ("CleanupEvents", j!({"ttl": "1s", "limit": -1})),
        ("ClaimStream", j!({"worker_id": "w", "max_in_flight": -1})),
        ("DrainWorker", j!({"session_id": ""})),
        ("ClaimTask", j!({"qty": -1})),
        ("SettleTasks", j!({})),
        ("ExtendClaims", j!({})),
        ("ReleaseClaims", j!({"claims": [{"run_id": "$new"}], "delay": "7200s"})),
        ("GetCheckpoint", j!({"task_id": "$new", "checkpoint_name": ""})),
        ("GetAllCheckpoints", j!({"run_id": ""})),
        ("GetCheckpointsForRun", j!({"run_id": ""})),
        ("GetRunCheckpoint", j!({"run_id": ""})),
        ("EmitEvent", j!({"event_name": " "})),
        ("CancelTask", j!({})),
        ("RetryTask", j!({"task_id": "$new", "max_attempts": -1})),
        ("GetTaskStatus", j!({"task_id": "$new", "params_range": {"offset": -1, "limit": 1}})),
        ("GetRunStatus", j!({"run_id": "x"})),
        ("GetTaskResult", j!({"task_id": "$new", "result_range": {"limit": 0}})),
        ("AwaitTaskResult", j!({"task_id": "$new", "timeout": "601s"})),
        ("ListTasks", j!({"page_size": 1001})),
        ("ListRuns", j!({"task_id": "$new", "page_token": "!"})),
        ("ListWaits", j!({})),
        ("Find", j!({"text": "12345"})),
        ("CreateWorkflowRun", j!({"workflow_name": "a__b", "workflow_version": "1"})),
    ] {
        no(rpc, "", wrong, "INVALID_ARGUMENT");
    }
    for rpc in [
        "GetQueueStats",
        "GetQueuePolicy",
        "SetQueuePolicy",
        "CleanupTasks",
        "CleanupEvents",
        "ClaimStream",
        "ClaimTask",
        "SettleTasks",
        "GetCheckpoint",
        "GetAllCheckpoints",
        "GetCheckpointsForRun",
        "GetRunCheckpoint",
        "EmitEvent",
        "CancelTask",
        "RetryTask",
        "GetTaskStatus",
        "GetRunStatus",
        "GetTaskResult",
        "AwaitTaskResult",
        "ListTasks",
        "ListRuns",
        "ListWaits",
        "Find",
    ] {
        let needs = match rpc {
            "CleanupTasks" | "CleanupEvents" => j!({"ttl": "1s"}),
            "ClaimStream" => j!({"worker_id": "w"}),
            "SettleTasks" => j!({"items": [{"run_id": "$new", "complete": {}}]}),
            "GetCheckpoint" => j!({"task_id": "$new", "checkpoint_name": "s"}),
            "GetRunCheckpoint" => j!({"run_id": "$new", "checkpoint_name": "s"}),
            "GetAllCheckpoints" | "GetCheckpointsForRun" | "GetRunStatus" => j!({"run_id": "$new"}),
            "EmitEvent" => j!({"event_name": "e"}),
            "CancelTask" | "RetryTask" | "GetTaskStatus" | "GetTaskResult" | "AwaitTaskResult" | "ListRuns"
            | "ListWaits" => {
                j!({"task_id": "$new"})
            }
            "Find" => j!({"text": "$new"}),
            _ => j!({}),
        };
        no(rpc, "", merged(&needs, &j!({"queue": "nowhere"})), "QUEUE_NOT_FOUND");
        let missing = match rpc {
            "GetAllCheckpoints" | "GetCheckpointsForRun" | "GetRunCheckpoint" | "GetRunStatus" => "RUN_NOT_FOUND",
            "CancelTask" | "RetryTask" | "GetTaskStatus" | "GetTaskResult" | "AwaitTaskResult" | "ListRuns"
            | "ListWaits" => "TASK_NOT_FOUND",
            _ => continue,
        };
        no(rpc, "", needs, missing);
    }
    no("CancelTask", "", j!({"run_id": "$new"}), "RUN_NOT_FOUND");
    let nobody = j!({"claim_token": "$token", "step_name": "s", "awaited_task_id": "$new"});
    no("AwaitTask", "running", nobody, "TASK_NOT_FOUND");
    let itself = j!({"claim_token": "$token", "step_name": "s", "awaited_task_id": "$task"});
    no("AwaitTask", "running", itself, "INVALID_ARGUMENT");
    no("RetryTask", "completed", j!({"task_id": "$task"}), "TASK_NOT_FAILED");
    no("RetryTask", "failed", j!({"task_id": "$task", "max_attempts": 1}), "MAX_ATTEMPTS_TOO_LOW");
    no("CreateQueue", "", j!({"storage_mode": "STORAGE_MODE_PARTITIONED"}), "QUEUE_EXISTS");
    let workflow = j!({"workflow_name": "a", "workflow_version": "1"});
    for (text, reason) in [("[]", "JSON_INVALID"), (large.as_str(), "PAYLOAD_TOO_LARGE")] {
        no("EmitEvent", "", j!({"event_name": "e", "payload": {"text": text.replace("[]", "{")}}), reason);
        no("CreateWorkflowRun", "", merged(&workflow, &j!({"inputs": {"text": text}})), reason);
    }
    let mut bare = |rpc, request: Json, reason| {
        cases.push(Case { rpc, kind: "", request, expected: Expected::Refused(reason) });
    };
    bare("ListQueues", j!({"page_size": -1}), "INVALID_ARGUMENT");
    bare("GetWorkflowRun", j!({"workflow_run_id": "x"}), "INVALID_ARGUMENT");
    bare("ListWorkflowRuns", j!({"page_size": -1}), "INVALID_ARGUMENT");
    bare("ListWorkflowRuns", j!({"tags": {"text": "{"}}), "JSON_INVALID");
    bare("ListWorkflowRuns", j!({"tags": {"text": large}}), "PAYLOAD_TOO_LARGE");
    bare("UpdateWorkflowRunStatus", j!({"workflow_run_id": "$v4", "task_count": -1}), "INVALID_ARGUMENT");
    bare("UpdateWorkflowRunStatus", j!({"workflow_run_id": "$v4", "error": {"text": "{"}}), "JSON_INVALID");
    bare("UpdateWorkflowRunStatus", j!({"workflow_run_id": "$v4", "result": {"text": large}}), "PAYLOAD_TOO_LARGE");
}

pub(super) fn filled(request: &Json, queue: &str, made: &Made) -> Json {
    let text = request.to_string();
    let (new, v4) = (Uuid::now_v7().to_string(), Uuid::new_v4().to_string());
    let text = text.replace("$queue", queue).replace("$task", &made.task).replace("$run", &made.run);
    let text = text.replace("$elsewhere", &made.elsewhere);
    text.replace("$token", &made.token).replace("$new", &new).replace("$v4", &v4).parse().unwrap()
}
