//! Benchmarks of the parts of the server that touch neither a socket nor the database: `cargo bench -p absurd-bench`.

#![allow(clippy::unwrap_used, reason = "a program for developers fails by panicking")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant as Monotonic};

use absurd_server::dispatch::outbox::Outbox;
use absurd_server::dispatch::state::{Spans, State, StreamOptions};
use absurd_server::domain::claim::Secret;
use absurd_server::domain::json::JsonBound;
use absurd_server::domain::{Claim, ClaimToken, Instant, JsonText, SessionId, WorkerId};
use absurd_server::store::run::Cursor;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tokio::time::Instant as Deadline;
use uuid::Uuid;

const STREAMS: u64 = 1000;

/// The check that refuses the JSON that jsonb would refuse, without building a tree.
fn json(c: &mut Criterion) {
    let mut group = c.benchmark_group("json guard");
    for (name, text) in [
        ("100 B", format!("{{\"id\": 123456, \"pad\": \"{}\"}}", "x".repeat(75))),
        ("10 KiB of small values", format!("[{}1]", "{\"a\": 1.5, \"b\": \"text\"},".repeat(430))),
        ("1 MiB of text", format!("\"{}\"", "x".repeat(1 << 20))),
    ] {
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(name, |b| {
            b.iter_batched(
                || text.clone(),
                |text| JsonText::parse("params", text, JsonBound { bytes: usize::MAX, depth: 100 }).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
}

fn token() -> ClaimToken {
    ClaimToken::new(Uuid::now_v7(), Secret::new().unwrap(), 60, Instant::from_micros(1_700_000_000_000_000), true)
}

fn tokens(c: &mut Criterion) {
    let token = token();
    let text = token.encode();
    c.bench_function("claim token: encode", |b| b.iter(|| black_box(&token).encode()));
    c.bench_function("claim token: parse and digest", |b| {
        b.iter(|| ClaimToken::parse(black_box(&text)).unwrap().digest());
    });
}

fn claim(token: ClaimToken) -> Claim {
    Claim {
        run_id: token.run_id,
        token,
        task_id: Uuid::now_v7(),
        attempt: 1,
        task_name: "noop".into(),
        params: JsonText::trusted("{}".into()),
        retry_strategy: None,
        max_attempts: None,
        headers: None,
        wake_event: None,
        event_payload: None,
        claim_expires_at: None,
        resumed: false,
        checkpoints: Vec::new(),
        checkpoints_complete: true,
        params_omitted: false,
    }
}

/// A dispatcher with streams of ten units of credit each.
fn state(now: Deadline) -> State {
    let mut state = State::default();
    for id in 1..=STREAMS {
        let options = StreamOptions {
            worker_id: WorkerId::parse("worker_id", "w").unwrap(),
            session_id: SessionId::parse("session_id", &id.to_string()).unwrap(),
            max_in_flight: 10,
            lease_seconds: 60,
            start_deadline: None,
            reconnect_grace: None,
            names: Arc::from([]),
            max_message_bytes: 4 << 20,
            accepts_omitted_params: false,
        };
        let spans = Spans { heartbeat: Duration::from_secs(15), stall: Duration::from_secs(30) };
        state.open(id, options, Arc::new(Outbox::default()), Vec::new(), now, spans, Duration::from_secs(1800));
    }
    state
}

/// Plans one claim over all streams, delivers the runs that it took, and returns their credit.
fn dispatch(c: &mut Criterion) {
    let spans = Spans { heartbeat: Duration::from_secs(15), stall: Duration::from_secs(30) };
    c.bench_function("dispatch: 500 runs to 1,000 streams and back", |b| {
        b.iter_custom(|rounds| {
            let now = Deadline::now();
            let mut state = state(now);
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                state.note_work();
                let began = Monotonic::now();
                let plan = state.turn(now, spans).plans.pop().unwrap();
                took += began.elapsed();
                let claims: Vec<(usize, Claim)> = (0..plan.slots.len()).map(|slot| (slot, claim(token()))).collect();
                let runs: Vec<Uuid> = claims.iter().map(|(_, claim)| claim.run_id).collect();
                let began = Monotonic::now();
                let returns = state.deliver(plan, claims, Cursor::HEAD, false, now, || Duration::ZERO);
                assert!(returns.is_empty());
                for run in runs {
                    state.left(run);
                }
                took += began.elapsed();
            }
            took
        });
    });
}

criterion_group!(pure, json, tokens, dispatch);
criterion_main!(pure);
