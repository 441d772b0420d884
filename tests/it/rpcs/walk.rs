//! A walk over all fields of all requests with values that do not belong there: only typed errors, nothing half-written.

use std::collections::BTreeSet;

use absurd_tests::in_time;
use futures_util::StreamExt as _;
use prost_reflect::{DynamicMessage, Kind, ReflectMessage as _, Value};
use tonic::Code;

use super::WIDTH;
use super::cases::{Case, Expected, cases, filled};
use super::world::{World, reason};

/// Reasons that no request brings about by itself.
const OF_THE_SERVER: &[&str] = &["UNAVAILABLE", "SHUTTING_DOWN", "TOO_MANY_REQUESTS", "DEADLINE_EXCEEDED"];

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
