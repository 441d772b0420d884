//! A walk over all fields of all requests with values that do not belong there: only typed errors, nothing half-written.

use std::collections::BTreeSet;

use absurd_tests::in_time;
use futures_util::StreamExt as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};
use tonic::Code;

use super::cases::{Case, Expected, cases, filled};
use super::world::{World, reason};
use super::{Sums, WIDTH};

/// Reasons that no request brings about by itself.
const OF_THE_SERVER: &[&str] = &["UNAVAILABLE", "SHUTTING_DOWN", "TOO_MANY_REQUESTS", "DEADLINE_EXCEEDED"];

/// Requests that were accepted, and refused, in all parts.
static COUNTS: Sums<2> = Sums::new();

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
    // Written out whole, a long text takes long.
    let text = match value.as_str() {
        Some(text) => format!("{:?}", text.chars().take(20).collect::<String>()),
        None => value.to_string(),
    };
    text.chars().take(20).collect()
}

/// What becomes of a field.
enum Change {
    Set(Value),
    /// A list of its first element so many times.
    Repeat(usize),
    Clear,
}

/// A change of one field, which may lie in others.
struct Edit {
    what: String,
    path: Vec<FieldDescriptor>,
    change: Change,
}

impl Edit {
    fn of(field: &FieldDescriptor, what: String, change: Change) -> Self {
        Self { what, path: vec![field.clone()], change }
    }

    /// The same change of a message that lies in a field.
    fn within(mut self, field: &FieldDescriptor, name: &str) -> Self {
        self.what = format!("{name}.{}", self.what);
        self.path.insert(0, field.clone());
        self
    }

    /// The message with this change.
    fn applied(&self, message: &DynamicMessage) -> DynamicMessage {
        changed(message, &self.path, &self.change)
    }
}

/// The message with a change at the end of a path. A list on the way keeps its first element only.
fn changed(message: &DynamicMessage, path: &[FieldDescriptor], change: &Change) -> DynamicMessage {
    let mut new = message.clone();
    match (path, change) {
        ([], _) => {}
        ([field], Change::Set(value)) => new.set_field(field, value.clone()),
        ([field], Change::Repeat(times)) => {
            new.set_field(field, Value::List(vec![Value::Message(inner(message, field)); *times]));
        }
        ([field], Change::Clear) => new.clear_field(field),
        ([field, rest @ ..], _) => {
            let value = Value::Message(changed(&inner(message, field), rest, change));
            new.set_field(field, if field.is_list() { Value::List(vec![value]) } else { value });
        }
    }
    new
}

/// The message in a field, of a list the first one; an empty one where there is none.
fn inner(message: &DynamicMessage, field: &FieldDescriptor) -> DynamicMessage {
    let Kind::Message(empty) = field.kind() else { panic!("{} holds no message", field.full_name()) };
    let value = message.get_field(field);
    let first = match value.as_list() {
        Some(list) => list.first(),
        None => Some(&*value),
    };
    first.and_then(Value::as_message).cloned().unwrap_or_else(|| DynamicMessage::new(empty))
}

/// All changes of one field of such a message, once per value; nested fields too. They fit any message of its kind, so
/// that they are made once: there are texts of a megabyte among them.
fn edits(descriptor: &MessageDescriptor) -> Vec<Edit> {
    let mut all = Vec::new();
    for field in descriptor.fields() {
        let name = field.name();
        if field.is_list() {
            all.push(Edit::of(&field, format!("{name}=[]"), Change::Set(Value::List(Vec::new()))));
            match field.kind() {
                Kind::Message(element) => {
                    all.push(Edit::of(&field, format!("{name}*1001"), Change::Repeat(1001)));
                    let nested = edits(&element).into_iter();
                    all.extend(nested.map(|edit| edit.within(&field, &format!("{name}[0]"))));
                }
                kind => all.extend(edits_of_list(&field, &kind)),
            }
        } else if let Kind::Message(inner) = field.kind() {
            let empty = Value::Message(DynamicMessage::new(inner.clone()));
            all.push(Edit::of(&field, format!("{name}=default"), Change::Set(empty)));
            all.extend(edits(&inner).into_iter().map(|edit| edit.within(&field, name)));
            all.push(Edit::of(&field, format!("no {name}"), Change::Clear));
        } else {
            let json = descriptor.full_name() == "absurd.v1.Json";
            for value in if json { json_corpus() } else { corpus(&field.kind()) } {
                all.push(Edit::of(&field, format!("{name}={}", short(&value)), Change::Set(value)));
            }
        }
    }
    all
}

/// Changes of a list of plain values: one value, and far too many.
fn edits_of_list(field: &FieldDescriptor, kind: &Kind) -> Vec<Edit> {
    let mut all = Vec::new();
    for value in corpus(kind) {
        let what = format!("{}[0]={}", field.name(), short(&value));
        all.push(Edit::of(field, what.clone(), Change::Set(Value::List(vec![value.clone()]))));
        if value.as_str().is_none_or(|text| text.len() < 100) {
            all.push(Edit::of(field, format!("{what}*10001"), Change::Set(Value::List(vec![value; 10_001]))));
        }
    }
    all
}

/// Walks a part of the fields of one RPC; returns how many requests were accepted and how many refused.
async fn walk(world: &World, index: usize, case: &Case, (part, parts): (usize, usize)) -> (usize, usize) {
    let (mut accepted, mut refused) = (0, 0);
    let edits = edits(&world.methods[case.rpc].input());
    let base = async |accepted: usize| {
        // A claim may be given back, a lease that was shortened may end, a task be cancelled by its rules: that would look like
        // something written.
        let moves_on = ["Claim", "Spawn", "Extend", "Set", "Save"];
        let queue = if moves_on.iter().any(|prefix| case.rpc.starts_with(prefix)) {
            format!("w{index}-{accepted}")
        } else {
            format!("w{index}")
        };
        let made = world.make(&queue, case.kind).await;
        let request = filled(&case.request, &queue, &made);
        let message = DynamicMessage::deserialize(world.methods[case.rpc].input(), request).unwrap();
        let before = world.fingerprint(&queue).await;
        (queue, message, before)
    };
    let (mut queue, mut message, mut before) = base(accepted).await;
    for edit in edits.iter().skip(part).step_by(parts) {
        let what = format!("{} with {}", case.rpc, edit.what);
        let request = edit.applied(&message);
        match in_time(case.rpc, world.call(case.rpc, &request)).await {
            Ok(_) => {
                accepted += 1;
                (queue, message, before) = base(accepted).await;
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

/// Walks a part of the fields of each RPC.
async fn walk_all(part: usize, parts: usize) {
    let world = World::new().await;
    let mut seen = BTreeSet::new();
    let cases: Vec<Case> = cases()
        .into_iter()
        .filter(|case| matches!(case.expected, Expected::Done(_)) && seen.insert(case.rpc))
        .collect();
    assert_eq!(cases.len(), world.methods.len(), "each RPC once");
    let walks = cases.iter().enumerate().map(|(index, case)| walk(&world, index, case, (part, parts)));
    let all = futures_util::stream::iter(walks);
    let counts: Vec<(usize, usize)> = all.buffer_unordered(WIDTH).collect().await;
    let (accepted, refused) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    println!("{accepted} requests accepted, {refused} refused");
    if let Some([accepted, refused]) = COUNTS.add(parts, [accepted, refused]) {
        assert!(accepted > 300 && refused > 1000, "{accepted} accepted, {refused} refused");
    }
    assert!(world.server.client().create_queue().await.is_ok(), "the server is well");
}

mod no_field_of_any_request_can_hurt {
    in_parts! { super::walk_all => first second third fourth fifth sixth }
}
