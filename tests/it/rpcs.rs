//! Every RPC, from a table: it succeeds, it is refused with each reason that its comment lists and with no other, repeating
//! it is what its comment says, and what is refused has written nothing. And a walk over all fields of all requests with
//! values that do not belong there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use absurd_server::postgres::{Cluster, ClusterOptions};
use absurd_server::settings::Settings;
use absurd_tests::{Database, Server, ServerOptions, eventually, in_time, root};
use futures_util::StreamExt as _;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DynamicMessage, Kind, MethodDescriptor, ReflectMessage as _, SerializeOptions, Value,
};
use serde_json::{Value as Json, json as j};
use tokio_postgres::Client as Sql;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// Cases at once.
const WIDTH: usize = 8;
/// Reasons that no request brings about by itself.
const OF_THE_SERVER: &[&str] = &["UNAVAILABLE", "SHUTTING_DOWN", "TOO_MANY_REQUESTS", "DEADLINE_EXCEEDED"];

/// Messages as they are.
#[derive(Debug, Clone, Copy, Default)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(out, &item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let length = bytes::Buf::remaining(from);
        Ok(Some(bytes::Buf::copy_to_bytes(from, length).to_vec()))
    }
}

/// What a case finds in its queue.
#[derive(Debug, Clone, Default)]
struct Made {
    task: String,
    run: String,
    token: String,
    /// A pending task of queue `q`.
    elsewhere: String,
}

struct World {
    server: Server,
    sql: Sql,
    channel: Channel,
    methods: BTreeMap<String, MethodDescriptor>,
    /// Longest time of a call.
    limit: Duration,
    /// A pending task of queue `q`.
    elsewhere: String,
}

impl World {
    async fn new() -> Self {
        Self::on(Server::start().await).await
    }

    async fn on(server: Server) -> Self {
        let sql = server.database().connect().await;
        let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
        let pool = DescriptorPool::decode(absurd_proto::FILE_DESCRIPTOR_SET).unwrap();
        let service = pool.get_service_by_name("absurd.v1.AbsurdService").unwrap();
        let methods = service.methods().map(|method| (method.name().to_owned(), method)).collect();
        let elsewhere = String::new();
        let world = Self { server, sql, channel, methods, limit: Duration::from_secs(20), elsewhere };
        let elsewhere = world.make_in("q", "pending").await.task;
        Self { elsewhere, ..world }
    }

    async fn call(&self, rpc: &str, request: &DynamicMessage) -> Result<Json, Status> {
        self.send(rpc, request.encode_to_vec()).await
    }

    async fn send(&self, rpc: &str, request: Vec<u8>) -> Result<Json, Status> {
        let method = &self.methods[rpc];
        let mut grpc = tonic::client::Grpc::new(self.channel.clone()).max_decoding_message_size(64 * 1024 * 1024);
        grpc.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
        let path: PathAndQuery = format!("/absurd.v1.AbsurdService/{rpc}").parse().unwrap();
        let mut sent = Request::new(request);
        sent.set_timeout(self.limit);
        let answer = if method.is_server_streaming() {
            let mut stream = grpc.server_streaming(sent, path, Bytes).await?.into_inner();
            stream.message().await?.expect("a first message")
        } else {
            grpc.unary(sent, path, Bytes).await?.into_inner()
        };
        let answer = DynamicMessage::decode(method.output(), answer.as_slice()).unwrap();
        let options = SerializeOptions::new().use_proto_field_name(true);
        Ok(answer.serialize_with_options(serde_json::value::Serializer, &options).unwrap())
    }

    async fn ask(&self, rpc: &str, request: Json) -> Json {
        let message = DynamicMessage::deserialize(self.methods[rpc].input(), request).unwrap();
        self.call(rpc, &message).await.unwrap_or_else(|status| panic!("{rpc}: {status:?}"))
    }

    /// Brings a task into a state.
    async fn make(&self, queue: &str, kind: &str) -> Made {
        Made { elsewhere: self.elsewhere.clone(), ..self.make_in(queue, kind).await }
    }

    async fn make_in(&self, queue: &str, kind: &str) -> Made {
        self.ask("CreateQueue", j!({"queue": queue})).await;
        let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
        let spawn = async || {
            let task = j!({"task_name": "n", "max_attempts": 1});
            let answer = self.ask("SpawnTask", j!({"queue": queue, "task": task})).await;
            Made { task: text(&answer["task"]["task_id"]), run: text(&answer["task"]["run_id"]), ..Made::default() }
        };
        let claim = async || {
            let answer = self.ask("ClaimTask", j!({"queue": queue, "claim_timeout": "60s"})).await;
            let claimed = &answer["tasks"][0];
            Made {
                task: text(&claimed["task_id"]),
                run: text(&claimed["run_id"]),
                token: text(&claimed["claim_token"]),
                ..Made::default()
            }
        };
        let made = match kind {
            "" => return Made::default(),
            "pending" => return spawn().await,
            _ => {
                spawn().await;
                claim().await
            }
        };
        let held = j!({"queue": queue, "claim_token": made.token});
        match kind {
            "running" => {}
            "completed" => drop(self.ask("CompleteTask", held).await),
            "failed" => drop(self.ask("FailTask", held).await),
            "cancelled" => drop(self.ask("CancelTask", j!({"queue": queue, "task_id": made.task})).await),
            "lost" => {
                let claims = j!([{"claim_token": made.token}]);
                self.ask("ReleaseClaims", j!({"queue": queue, "claims": claims})).await;
                assert_eq!(claim().await.run, made.run, "claimed again by another one");
            }
            "expired" => {
                let expire = format!("update absurd.\"r_{queue}\" set claim_expires_at = now() - interval '1 s'");
                self.sql.batch_execute(&expire).await.unwrap();
                self.sql.execute("select absurd.claim_task($1, 'sweeper', 30, 1)", &[&queue]).await.unwrap();
            }
            other => panic!("no such kind: {other}"),
        }
        made
    }

    /// All that a queue holds, itself, and its workflow runs.
    async fn fingerprint(&self, queue: &str) -> String {
        let tables = ["t", "r", "c", "e", "w"].map(|kind| format!("absurd.\"{kind}_{queue}\""));
        let rows = |table: &str| format!("select x::text as line from {table} x");
        let mut all: Vec<String> = tables.iter().map(|table| rows(table)).collect();
        all.push(format!("{} where absurd_queue = '{queue}'", rows("absurd_server.workflow_run")));
        all.push(format!("{} where queue_name = '{queue}'", rows("absurd.queues")));
        let all = all.join(" union all ");
        let read = format!("select coalesce(md5(string_agg(line, '|' order by line)), '') from ({all}) a");
        match self.sql.query_one(&read, &[]).await {
            Ok(row) => row.get(0),
            // The queue was dropped, or never was.
            Err(_) => String::new(),
        }
    }
}

/// What saying it again brings.
enum Again {
    /// The same answer.
    Same,
    /// The same answer but for these fields.
    But(Json),
    /// This refusal.
    Refused(&'static str),
    /// Another effect, as the comment says.
    Anew,
}

enum Expected {
    Done(Again),
    Refused(&'static str),
}

/// One request: `$queue`, `$task`, `$run`, `$token` stand for what was made, `$new` and `$v4` for ids.
struct Case {
    rpc: &'static str,
    kind: &'static str,
    request: Json,
    expected: Expected,
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

fn merged(base: &Json, more: &Json) -> Json {
    let mut merged = base.clone();
    for (name, value) in more.as_object().unwrap() {
        let nested = value.is_object() && merged[name].is_object();
        merged[name] = if nested { self::merged(&merged[name], value) } else { value.clone() };
    }
    merged
}

fn cases() -> Vec<Case> {
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
        "max_attempts": 2, "workflow_run_id": "$v4"});
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
        // Without a token only the state counts, and the storage contract lets completed runs write checkpoints (7.17).
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
    ] {
        let needs = match rpc {
            "CleanupTasks" | "CleanupEvents" => j!({"ttl": "1s"}),
            "ClaimStream" => j!({"worker_id": "w"}),
            "SettleTasks" => j!({"items": [{"run_id": "$new", "complete": {}}]}),
            "GetCheckpoint" => j!({"task_id": "$new", "checkpoint_name": "s"}),
            "GetRunCheckpoint" => j!({"run_id": "$new", "checkpoint_name": "s"}),
            "GetAllCheckpoints" | "GetCheckpointsForRun" | "GetRunStatus" => j!({"run_id": "$new"}),
            "EmitEvent" => j!({"event_name": "e"}),
            "CancelTask" | "RetryTask" | "GetTaskStatus" | "GetTaskResult" | "AwaitTaskResult" => {
                j!({"task_id": "$new"})
            }
            _ => j!({}),
        };
        no(rpc, "", merged(&needs, &j!({"queue": "nowhere"})), "QUEUE_NOT_FOUND");
        let missing = match rpc {
            "GetAllCheckpoints" | "GetCheckpointsForRun" | "GetRunCheckpoint" | "GetRunStatus" => "RUN_NOT_FOUND",
            "CancelTask" | "RetryTask" | "GetTaskStatus" | "GetTaskResult" | "AwaitTaskResult" => "TASK_NOT_FOUND",
            _ => continue,
        };
        no(rpc, "", needs, missing);
    }
    no("CancelTask", "", j!({"run_id": "$new"}), "RUN_NOT_FOUND");
    let nobody = j!({"claim_token": "$token", "step_name": "s", "awaited_task_id": "$new"});
    no("AwaitTask", "running", nobody, "TASK_NOT_FOUND");
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

fn filled(request: &Json, queue: &str, made: &Made) -> Json {
    let text = request.to_string();
    let (new, v4) = (Uuid::now_v7().to_string(), Uuid::new_v4().to_string());
    let text = text.replace("$queue", queue).replace("$task", &made.task).replace("$run", &made.run);
    let text = text.replace("$elsewhere", &made.elsewhere);
    text.replace("$token", &made.token).replace("$new", &new).replace("$v4", &v4).parse().unwrap()
}

fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("an error without a reason: {status:?}"));
    assert_eq!(info.domain, "absurd.v1");
    info.reason.clone()
}

async fn check(world: &World, index: usize, case: &Case) {
    let queue = format!("c{index}");
    let made = world.make(&queue, case.kind).await;
    let request = filled(&case.request, &queue, &made);
    let short: String = request.to_string().chars().take(200).collect();
    let what = format!("{} {} {short}", case.rpc, case.kind);
    let message = DynamicMessage::deserialize(world.methods[case.rpc].input(), request).expect(&what);
    let before = world.fingerprint(&queue).await;
    let first = in_time(&what, world.call(case.rpc, &message)).await;
    match (&case.expected, first) {
        (Expected::Refused(expected), Err(status)) => {
            assert_eq!(reason(&status), *expected, "{what}: {status:?}");
            assert_eq!(world.fingerprint(&queue).await, before, "{what}: refused, and yet written");
            let again = world.call(case.rpc, &message).await.expect_err(&what);
            assert_eq!(reason(&again), *expected, "{what}: said again");
        }
        (Expected::Done(again), Ok(first)) => match (again, in_time(&what, world.call(case.rpc, &message)).await) {
            (Again::Anew, second) => drop(second.expect(&what)),
            (Again::Refused(expected), second) => assert_eq!(reason(&second.expect_err(&what)), *expected, "{what}"),
            (Again::Same, second) => assert_eq!(second.expect(&what), first, "{what}: said again"),
            (Again::But(changes), second) => {
                // What is false or 0 is not on the wire.
                let expected: Json = without_defaults(&merged(&first, changes));
                assert_eq!(second.expect(&what), expected, "{what}: said again");
            }
        },
        (Expected::Done(_), Err(status)) => panic!("{what}: {status:?}"),
        (Expected::Refused(expected), Ok(answer)) => panic!("{what}: not refused with {expected}: {answer}"),
    }
}

fn without_defaults(value: &Json) -> Json {
    let Some(object) = value.as_object() else { return value.clone() };
    let kept = object.iter().filter(|(_, value)| **value != j!(false) && **value != j!(0));
    Json::Object(kept.map(|(name, value)| (name.clone(), without_defaults(value))).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_succeeds_is_refused_and_repeated_as_its_comment_says() {
    let world = World::new().await;
    let cases = cases();
    let all = futures_util::stream::iter(cases.iter().enumerate().map(|(index, case)| check(&world, index, case)));
    all.buffer_unordered(WIDTH).collect::<Vec<()>>().await;
}

/// What the comments of the service list, by RPC.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let proto = std::fs::read_to_string(root().join("proto/absurd/v1/absurd_service.proto")).unwrap();
    let (_, service) = proto.split_once("service AbsurdService {").unwrap();
    let mut documented = BTreeMap::new();
    let mut comment = String::new();
    for line in service.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("//") {
            comment.push_str(text);
        } else if let Some(name) = line.strip_prefix("rpc ").and_then(|rest| rest.split('(').next()) {
            let (_, errors) = comment.rsplit_once("Errors:").unwrap_or_else(|| panic!("{name} lists no errors"));
            let names = errors.trim().trim_end_matches('.').split(',').map(|name| name.trim().to_owned());
            documented.insert(name.to_owned(), names.collect());
            comment.clear();
        }
    }
    documented
}

#[test]
fn the_table_has_every_rpc_with_every_reason_of_its_comment() {
    let documented = documented();
    let mut tested: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut succeeded = BTreeSet::new();
    for case in cases() {
        let reasons = tested.entry(case.rpc.to_owned()).or_default();
        match case.expected {
            Expected::Refused(reason) => drop(reasons.insert(reason.to_owned())),
            Expected::Done(_) => drop(succeeded.insert(case.rpc.to_owned())),
        }
    }
    // A test of its own, below: it needs a full server.
    tested.entry("ClaimStream".into()).or_default().insert("STREAM_LIMIT".into());
    assert_eq!(tested, documented);
    assert_eq!(succeeded, documented.keys().cloned().collect());
    let pool = DescriptorPool::decode(absurd_proto::FILE_DESCRIPTOR_SET).unwrap();
    let service = pool.get_service_by_name("absurd.v1.AbsurdService").unwrap();
    assert_eq!(service.methods().len(), documented.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_refuses_streams() {
    let settings = Settings { max_streams: Some(1), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let mut grpc = server.raw().await;
    let request =
        absurd_proto::v1::ClaimStreamRequest { queue: "q".into(), worker_id: "w".into(), ..Default::default() };
    let first = grpc.claim_stream(request.clone()).await.unwrap();
    let refused = grpc.claim_stream(request).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "STREAM_LIMIT"));
    assert!(refused.get_error_details().retry_info().is_some());
    drop(first);
}

/// Bytes that are no message, and messages that are too large, are refused in our words too.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_refused_with_a_reason() {
    let world = World::new().await;
    for rpc in world.methods.keys() {
        let garbage = world.send(rpc, vec![0xff; 10]).await.unwrap_err();
        assert_eq!((garbage.code(), reason(&garbage).as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"), "{rpc}");
        let field = garbage.get_error_details().bad_request().unwrap().field_violations[0].field.clone();
        assert_eq!(field, "request", "{rpc}");
    }
    let large = world.send("SpawnTask", vec![0; 17 * 1024 * 1024]).await.unwrap_err();
    assert_eq!((large.code(), reason(&large).as_str()), (Code::InvalidArgument, "PAYLOAD_TOO_LARGE"));
    let details = large.get_error_details();
    assert_eq!(details.error_info().unwrap().metadata["limit"], (16 * 1024 * 1024).to_string());
    assert_eq!(details.error_info().unwrap().metadata["size"], (17 * 1024 * 1024).to_string());
}

/// Whatever is asked while Postgres is away: an answer that says so, soon, and that it passes; and it does.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_every_rpc_says_so() {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let options = ClusterOptions {
        home: home.path().join("pg"),
        bin: absurd_tests::pg_bin(),
        durable: false,
        settings: Vec::new(),
    };
    let start = || {
        let options = options.clone();
        tokio::task::spawn_blocking(move || Cluster::start(&options).unwrap())
    };
    let mut cluster = start().await.unwrap();
    let server = Server::start_on(&Database::on(&cluster).await).await;
    let mut world = World::on(server).await;
    let mut seen = BTreeSet::new();
    let mut requests = Vec::new();
    for (index, case) in cases().into_iter().enumerate() {
        if matches!(case.expected, Expected::Done(_)) && seen.insert(case.rpc) {
            let queue = format!("c{index}");
            let made = world.make(&queue, case.kind).await;
            let request = filled(&case.request, &queue, &made);
            requests.push((case.rpc, DynamicMessage::deserialize(world.methods[case.rpc].input(), request).unwrap()));
        }
    }
    cluster.stop();
    // Writes that are committed in groups wait for Postgres to come back, as long as their callers do.
    world.limit = Duration::from_secs(2);
    let asked = requests.iter().map(async |(rpc, request)| (*rpc, world.call(rpc, request).await));
    let answers = in_time("all answers", futures_util::future::join_all(asked)).await;
    for (rpc, answer) in answers {
        match answer {
            // Each item is answered on its own; and one call speaks to no database.
            Ok(answer) => match rpc {
                "SettleTasks" => assert_eq!(answer["results"][0]["error"]["reason"], "UNAVAILABLE"),
                "ExtendClaims" | "ReleaseClaims" => assert_eq!(answer["verdicts"][0]["verdict"], "VERDICT_BUSY"),
                _ => assert_eq!(rpc, "DrainWorker"),
            },
            Err(status) => {
                assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "UNAVAILABLE"), "{rpc}");
                assert!(status.get_error_details().retry_info().is_some(), "{rpc}");
            }
        }
    }
    drop(cluster);
    let mut cluster = start().await.unwrap();
    let client = world.server.client();
    eventually("it has passed", || async { client.get_queue_stats().await.ok() }).await;
    world.server.stop().await;
    cluster.stop();
}

/// A call that waits when its replica leaves is told to go to another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_leaves_says_so() {
    let server = Server::start().await;
    let mut waiting = server.raw().await;
    let claim = tokio::spawn(async move {
        let wait = Some(prost_types::Duration { seconds: 60, nanos: 0 });
        let request = absurd_proto::v1::ClaimTaskRequest { queue: "q".into(), wait, ..Default::default() };
        waiting.claim_task(request).await
    });
    let sql = server.database().connect().await;
    eventually("the call waits: the idle server has armed the doorbell", || async {
        let armed = "select count(*) > 0 from absurd_server.armed where queue_name = 'q'";
        sql.query_one(armed, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    in_time("it stops", server.stop()).await;
    let told = in_time("an answer", claim).await.unwrap().unwrap_err();
    assert_eq!((told.code(), reason(&told).as_str()), (Code::Unavailable, "SHUTTING_DOWN"));
    assert!(told.get_error_details().retry_info().is_some());
}

/// Values that do not belong there, or just about do.
fn corpus(kind: &Kind) -> Vec<Value> {
    let texts = || {
        let long = "x".repeat(70_000);
        let texts = [
            "",
            " ",
            "\0",
            "\u{feff}\u{202e}",
            "x",
            "00000000-0000-0000-0000-000000000000",
            "'; drop table t;--",
            "%s{t}",
            &long,
        ];
        texts.map(|text| Value::String(text.to_owned())).to_vec()
    };
    match kind {
        Kind::String => texts(),
        Kind::Bool => vec![Value::Bool(true), Value::Bool(false)],
        Kind::Int32 => [i32::MIN, -1, 0, 1, i32::MAX].map(Value::I32).to_vec(),
        Kind::Int64 => [i64::MIN, -1, 0, 1, i64::MAX].map(Value::I64).to_vec(),
        Kind::Double => [f64::NAN, f64::INFINITY, -1.0, f64::MAX].map(Value::F64).to_vec(),
        Kind::Enum(_) => [-1, 0, 99].map(Value::EnumNumber).to_vec(),
        other => panic!("no corpus for {other:?}"),
    }
}

fn json_corpus() -> Vec<Value> {
    let deep = format!("{}{}", "[".repeat(101), "]".repeat(101));
    let large = format!("\"{}\"", "x".repeat(1024 * 1024));
    let texts = [
        "",
        " ",
        "{",
        "nul",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "1e400000",
        "[1,]",
        "{\"a\":1}{}",
        "\0",
        "null",
        "{\"a\": NaN}",
        &deep,
        &large,
    ];
    texts.map(|text| Value::String(text.to_owned())).to_vec()
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(20).collect()
}

/// The message with one field changed, once per value; nested fields too.
fn mutations(message: &DynamicMessage) -> Vec<(String, DynamicMessage)> {
    let mut all = Vec::new();
    let descriptor = message.descriptor();
    for field in descriptor.fields() {
        let mut with = |path: String, value: Value| {
            let mut changed = message.clone();
            changed.set_field(&field, value);
            all.push((path, changed));
        };
        let name = field.name();
        if field.is_list() {
            let elements = message.get_field(&field).as_list().unwrap().to_vec();
            with(format!("{name}=[]"), Value::List(Vec::new()));
            match field.kind() {
                Kind::Message(element) => {
                    let first = elements.first().and_then(Value::as_message).cloned();
                    let first = first.unwrap_or_else(|| DynamicMessage::new(element));
                    with(format!("{name}*1001"), Value::List(vec![Value::Message(first.clone()); 1001]));
                    for (path, inner) in mutations(&first) {
                        with(format!("{name}[0].{path}"), Value::List(vec![Value::Message(inner)]));
                    }
                }
                kind => {
                    for value in corpus(&kind) {
                        with(format!("{name}[0]={}", short(&value)), Value::List(vec![value.clone()]));
                        if value.as_str().is_none_or(|text| text.len() < 100) {
                            with(format!("{name}[0]={}*10001", short(&value)), Value::List(vec![value; 10_001]));
                        }
                    }
                }
            }
        } else if let Kind::Message(inner) = field.kind() {
            let now = message.get_field(&field).into_owned();
            let now =
                if message.has_field(&field) { now.as_message().unwrap().clone() } else { DynamicMessage::new(inner) };
            with(format!("{name}=default"), Value::Message(DynamicMessage::new(now.descriptor())));
            for (path, inner) in mutations(&now) {
                with(format!("{name}.{path}"), Value::Message(inner));
            }
            let mut without = message.clone();
            without.clear_field(&field);
            all.push((format!("no {name}"), without));
        } else {
            let json = descriptor.full_name() == "absurd.v1.Json";
            for value in if json { json_corpus() } else { corpus(&field.kind()) } {
                with(format!("{name}={}", short(&value)), value);
            }
        }
    }
    all
}

/// Walks one RPC; returns how many requests were accepted and how many refused.
async fn walk(world: &World, index: usize, case: &Case) -> (usize, usize) {
    let (mut accepted, mut refused) = (0, 0);
    let base = async |accepted: usize| {
        // A claim may be given back, a task be cancelled by its rules: that would look like something written.
        let queue = if case.rpc.starts_with("Claim") || case.rpc.starts_with("Spawn") {
            format!("w{index}-{accepted}")
        } else {
            format!("w{index}")
        };
        let made = world.make(&queue, case.kind).await;
        let request = filled(&case.request, &queue, &made);
        let message = DynamicMessage::deserialize(world.methods[case.rpc].input(), request).unwrap();
        let before = world.fingerprint(&queue).await;
        (queue, mutations(&message), before)
    };
    let (mut queue, mut changed, mut before) = base(accepted).await;
    for place in 0..changed.len() {
        let what = format!("{} with {}", case.rpc, changed[place].0);
        match in_time(case.rpc, world.call(case.rpc, &changed[place].1)).await {
            Ok(_) => {
                accepted += 1;
                (queue, changed, before) = base(accepted).await;
            }
            Err(status) => {
                refused += 1;
                let reason = reason(&status);
                assert!(!matches!(status.code(), Code::Internal | Code::Unknown), "{what}: {status:?}");
                assert!(!OF_THE_SERVER.contains(&reason.as_str()), "{what}: {status:?}");
                assert_eq!(world.fingerprint(&queue).await, before, "{what}: refused, and yet written");
            }
        }
    }
    (accepted, refused)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_field_of_any_request_can_hurt() {
    let world = World::new().await;
    let mut seen = BTreeSet::new();
    let cases: Vec<Case> = cases()
        .into_iter()
        .filter(|case| matches!(case.expected, Expected::Done(_)) && seen.insert(case.rpc))
        .collect();
    assert_eq!(cases.len(), world.methods.len(), "each RPC once");
    let all = futures_util::stream::iter(cases.iter().enumerate().map(|(index, case)| walk(&world, index, case)));
    let counts: Vec<(usize, usize)> = all.buffer_unordered(WIDTH).collect().await;
    let (accepted, refused) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    println!("{accepted} requests accepted, {refused} refused");
    assert!(accepted > 300 && refused > 1000, "{accepted} accepted, {refused} refused");
    assert!(world.server.client().create_queue().await.is_ok(), "the server is well");
}
