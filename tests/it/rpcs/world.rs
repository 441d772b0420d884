//! A server whose RPCs are called by name, with messages built from the descriptors.

use std::collections::BTreeMap;
use std::time::Duration;

use absurd_tests::Server;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, SerializeOptions};
use serde_json::{Value as Json, json as j};
use tokio_postgres::Client as Sql;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

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
pub(super) struct Made {
    pub(super) task: String,
    pub(super) run: String,
    pub(super) token: String,
    /// A pending task of queue `q`.
    pub(super) elsewhere: String,
}

pub(super) struct World {
    pub(super) server: Server,
    sql: Sql,
    channel: Channel,
    pub(super) methods: BTreeMap<String, MethodDescriptor>,
    /// Longest time of a call.
    pub(super) limit: Duration,
    /// A pending task of queue `q`.
    elsewhere: String,
}

impl World {
    pub(super) async fn new() -> Self {
        Self::on(Server::start().await).await
    }

    pub(super) async fn on(server: Server) -> Self {
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

    pub(super) async fn call(&self, rpc: &str, request: &DynamicMessage) -> Result<Json, Status> {
        self.send(rpc, request.encode_to_vec()).await
    }

    pub(super) async fn send(&self, rpc: &str, request: Vec<u8>) -> Result<Json, Status> {
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

    pub(super) async fn ask(&self, rpc: &str, request: Json) -> Json {
        let message = DynamicMessage::deserialize(self.methods[rpc].input(), request).unwrap();
        self.call(rpc, &message).await.unwrap_or_else(|status| panic!("{rpc}: {status:?}"))
    }

    /// Brings a task into a state.
    pub(super) async fn make(&self, queue: &str, kind: &str) -> Made {
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
            let answer = self.ask("ClaimTask", j!({"queue": queue, "claim_timeout": "3600s"})).await;
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
    pub(super) async fn fingerprint(&self, queue: &str) -> String {
        let tables = ["t", "r", "c", "e", "w"].map(|kind| format!("absurd.\"{kind}_{queue}\""));
        let rows = |table: &str| format!("select x::text as line from {table} x");
        let mut all: Vec<String> = tables.iter().map(|table| rows(table)).collect();
        // The walks try the nil id everywhere: a run that one of them made under it is another one's to update.
        all.push(format!(
            "{} where absurd_queue = '{queue}' and workflow_run_id <> '{}'",
            rows("absurd_server.workflow_run"),
            uuid::Uuid::nil()
        ));
        all.push(format!("{} where queue_name = '{queue}'", rows("absurd.queues")));
        all.push(format!("{} where waiting_queue = '{queue}'", rows("absurd_server.awaited_task")));
        let all = all.join(" union all ");
        let read = format!("select coalesce(string_agg(line, E'\\n' order by line), '') from ({all}) a");
        match self.sql.query_one(&read, &[]).await {
            Ok(row) => row.get(0),
            // The queue was dropped, or never was.
            Err(_) => String::new(),
        }
    }
}

/// The reason of an error, which must have one of ours.
pub(super) fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("an error without a reason: {status:?}"));
    assert_eq!(info.domain, "absurd.v1");
    info.reason.clone()
}
