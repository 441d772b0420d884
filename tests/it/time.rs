//! Sleeps and schedules over gRPC.

use std::time::{Duration, SystemTime};

use absurd_client::{
    Awaited, ClaimOptions, ClaimStream, ClaimedTask, Reason, Slept, SpawnOptions, State, StreamOptions,
};
use absurd_proto::v1 as pb;
use absurd_tests::{Server, in_time};
use serde_json::json as j;
use uuid::Uuid;

async fn stream(server: &Server) -> ClaimStream {
    server.client().claim_stream(StreamOptions { max_in_flight: 5, ..StreamOptions::default() }).await.unwrap()
}

async fn next(stream: &mut ClaimStream) -> ClaimedTask {
    in_time("a task arrives", stream.next()).await.unwrap()
}

async fn spawn(server: &Server) -> Uuid {
    let options = SpawnOptions { max_attempts: Some(3), ..SpawnOptions::default() };
    server.client().spawn_task("n", &j!(null), options).await.unwrap().run_id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleep_survives_and_does_not_begin_anew() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let mut tasks = stream(&server).await;
    let run = spawn(&server).await;
    let task = next(&mut tasks).await;
    assert_eq!(
        client.sleep(run, Duration::ZERO, Some("none")).await.unwrap(),
        Slept::Elapsed,
        "no time at all is over at once"
    );
    let Slept::Suspended { wake_at } = client.sleep(run, Duration::from_millis(400), None).await.unwrap() else {
        panic!("the run sleeps")
    };
    drop(task);
    let woken = next(&mut tasks).await;
    assert!(SystemTime::now() >= wake_at);
    assert_eq!((woken.run_id, woken.attempt), (run, 1));
    assert_eq!(client.sleep(run, Duration::from_millis(400), None).await.unwrap(), Slept::Elapsed);
    // The time is stored as the SDKs store it, under the name that the original client uses.
    let stored = client.get_run_checkpoint(run, "sleep_0").await.unwrap().unwrap().state.unwrap();
    assert!(stored.as_str().starts_with("\"20") && stored.as_str().ends_with("+00:00\""), "{}", stored.as_str());

    // A sleep never passes for over because another step has its name.
    assert!(client.set_checkpoint(woken.task_id, "taken", &j!({"x": 1}), run, None).await.unwrap());
    let taken = client.sleep(run, Duration::from_secs(60), Some("taken")).await.unwrap_err();
    assert_eq!((taken.reason(), taken.field()), (Reason::InvalidArgument, Some("step_name")));

    // Claimed before its time, it goes on sleeping until the first deadline; said twice, too.
    let long = client.sleep(run, Duration::from_secs(3600), Some("long")).await.unwrap();
    let Slept::Suspended { wake_at: deadline } = long else { panic!("the run sleeps") };
    drop(woken);
    sql.execute("update absurd.r_q set available_at = now()", &[]).await.unwrap();
    let early = next(&mut tasks).await;
    assert_eq!(client.sleep(run, Duration::from_secs(9999), Some("long")).await.unwrap(), long);
    let mut grpc = server.raw().await;
    let again = pb::SleepRequest {
        queue: "q".into(),
        run_id: String::new(),
        claim_token: Some(early.claim_token().to_owned()),
        step_name: "long".into(),
        until: Some(pb::sleep_request::Until::Duration(prost_types::Duration { seconds: 3600, nanos: 0 })),
    };
    let answer = grpc.sleep(again).await.unwrap().into_inner().outcome.unwrap();
    assert!(matches!(answer, pb::sleep_response::Outcome::Suspended(at) if at.wake_at == Some(deadline.into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_moved_to_a_time() {
    let server = Server::start().await;
    let client = server.client();
    let soon = || SystemTime::now() + Duration::from_millis(500);
    // A pending run, as all examples of the original client do it.
    let run = spawn(&server).await;
    client.schedule_task(run, SystemTime::now() + Duration::from_secs(3600)).await.unwrap();
    assert!(client.claim_task(ClaimOptions::default()).await.unwrap().is_empty());
    let at = soon();
    client.schedule_task(run, at).await.unwrap();
    let mut tasks = stream(&server).await;
    let task = next(&mut tasks).await;
    assert!(SystemTime::now() >= at - Duration::from_millis(5), "not before its time");
    // A running one: its claim is over.
    client.schedule_task(run, soon()).await.unwrap();
    let lost = task.complete(&j!(1)).await.unwrap_err();
    assert_eq!(lost.reason(), Reason::ClaimLost);
    let task = next(&mut tasks).await;
    // One that waits for an event is not moved, nor one that has ended.
    assert!(matches!(task.await_event("s", "e", None).await.unwrap(), Awaited::Suspended { .. }));
    let refused = client.schedule_task(run, soon()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::RunNotRunning);
    client.emit_event("e", &j!(1)).await.unwrap();
    let task = next(&mut tasks).await;
    task.complete(&j!(1)).await.unwrap();
    let refused = client.schedule_task(run, soon()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::RunNotRunning);
    let unknown = client.schedule_task(Uuid::now_v7(), soon()).await.unwrap_err();
    assert_eq!(unknown.reason(), Reason::RunNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrator_puts_its_run_to_sleep() {
    let server = Server::start().await;
    let client = server.client();
    let mut tasks = stream(&server).await;
    let run = spawn(&server).await;
    let task = next(&mut tasks).await;
    // The wait has put it to sleep already; the original client's next call changes nothing.
    assert!(matches!(task.await_event("s", "e", None).await.unwrap(), Awaited::Suspended { .. }));
    assert_eq!(client.set_run_sleeping(run, "e").await.unwrap(), None);
    client.emit_event("e", &j!(1)).await.unwrap();
    let task = next(&mut tasks).await;
    // From running, with all that belongs to it.
    let wake_at = client.set_run_sleeping(run, "other").await.unwrap().expect("a day at most");
    assert!(wake_at > SystemTime::now() + Duration::from_secs(23 * 3600));
    let status = client.get_run_status(run).await.unwrap().unwrap();
    assert_eq!((status.state, status.claimed_by, status.claim_expires_at), (State::Sleeping, None, None));
    assert_eq!(client.get_task_status(task.task_id).await.unwrap().unwrap().state, State::Sleeping);
    let refused = client.set_run_sleeping(run, "yet another").await.unwrap_err();
    assert_eq!(refused.reason(), Reason::RunNotRunning);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_times_are_refused() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let run = spawn(&server).await.to_string();
    let span = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    for duration in [None, span(-1), span(400_000_000)] {
        let until = duration.map(pb::sleep_request::Until::Duration);
        let request = pb::SleepRequest { queue: "q".into(), run_id: run.clone(), until, ..Default::default() };
        let status = grpc.sleep(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    }
    let request = pb::ScheduleTaskRequest { queue: "q".into(), run_id: run.clone(), ..Default::default() };
    assert!(grpc.schedule_task(request).await.unwrap_err().message().contains("wake_at or delay"));
    let request = pb::WaitForEventRequest {
        queue: "q".into(),
        run_id: run,
        step_name: "s".into(),
        event_name: "e".into(),
        ..Default::default()
    };
    assert!(grpc.wait_for_event(request).await.unwrap_err().message().contains("timeout"), "there is no default");
}

/// "Never" as .NET and Java say it, and a time whose microseconds a double does not hold.
#[tokio::test(flavor = "multi_thread")]
async fn times_far_away_are_kept_to_the_microsecond() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let sql = server.database().connect().await;
    let queue = || "q".to_owned();
    for (seconds, nanos, micros, text) in [
        (253_402_300_799, 999_999_900, 999_999, "9999-12-31T23:59:59.999999+00:00"),
        (95_617_584_000, 123_457_000, 123_457, "5000-01-01T00:00:00.123457+00:00"),
    ] {
        let asked = prost_types::Timestamp { seconds, nanos };
        let kept = prost_types::Timestamp { seconds, nanos: micros * 1000 };
        let start = pb::new_task::Start::StartAt(asked);
        let task = pb::NewTask { task_name: "later".into(), start: Some(start), ..Default::default() };
        let request = pb::SpawnTaskRequest { queue: queue(), task: Some(task) };
        let spawned = grpc.spawn_task(request).await.unwrap().into_inner().task.unwrap();
        let available = async |grpc: &mut absurd_tests::Grpc, run_id: &str| {
            let request = pb::GetRunStatusRequest { queue: queue(), run_id: run_id.to_owned() };
            grpc.get_run_status(request).await.unwrap().into_inner().run.unwrap().available_at
        };
        assert_eq!(available(&mut grpc, &spawned.run_id).await, Some(kept), "a start");

        spawn(&server).await;
        let claim = server.client().claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        let run_id = claim.run_id.to_string();
        let sleep = pb::SleepRequest {
            queue: queue(),
            claim_token: Some(claim.claim_token().to_owned()),
            step_name: "s".into(),
            until: Some(pb::sleep_request::Until::WakeAt(asked)),
            ..Default::default()
        };
        for _ in 0..2 {
            let outcome = grpc.sleep(sleep.clone()).await.unwrap().into_inner().outcome.unwrap();
            assert!(
                matches!(&outcome, pb::sleep_response::Outcome::Suspended(at) if at.wake_at == Some(kept)),
                "{outcome:?}"
            );
        }
        assert_eq!(available(&mut grpc, &run_id).await, Some(kept), "a sleep");
        let read = "select state #>> '{}' from absurd.c_q where owner_run_id = $1";
        let stored = sql.query_one(read, &[&claim.run_id]).await.unwrap();
        assert_eq!(stored.get::<_, &str>(0), text, "as the SDKs read it");

        let when = Some(pb::schedule_task_request::When::WakeAt(asked));
        let schedule = pb::ScheduleTaskRequest { queue: queue(), run_id: run_id.clone(), when, ..Default::default() };
        assert_eq!(grpc.schedule_task(schedule).await.unwrap().into_inner().wake_at, Some(kept));
        assert_eq!(available(&mut grpc, &run_id).await, Some(kept), "a schedule");
    }
    // A delay keeps its microseconds, too.
    spawn(&server).await;
    let claim = server.client().claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let sleep = pb::SleepRequest {
        queue: queue(),
        claim_token: Some(claim.claim_token().to_owned()),
        step_name: "s".into(),
        until: Some(pb::sleep_request::Until::Duration(prost_types::Duration { seconds: 300_000_000, nanos: 1000 })),
        ..Default::default()
    };
    grpc.sleep(sleep).await.unwrap();
    let read = "select extract(microseconds from (state #>> '{}')::timestamptz - updated_at)::bigint % 1000000
                  from absurd.c_q where owner_run_id = $1";
    assert_eq!(sql.query_one(read, &[&claim.run_id]).await.unwrap().get::<_, i64>(0), 1);
    // What SQL has written beyond the years that a timestamp may have.
    sql.execute("update absurd.r_q set available_at = '20000-01-01', created_at = '4000-01-01 BC'", &[]).await.unwrap();
    let request = pb::GetRunStatusRequest { queue: queue(), run_id: claim.run_id.to_string() };
    let run = grpc.get_run_status(request).await.unwrap().into_inner().run.unwrap();
    assert_eq!(run.available_at, Some(prost_types::Timestamp { seconds: 253_402_300_799, nanos: 999_999_000 }));
    assert_eq!(run.created_at, Some(prost_types::Timestamp { seconds: -62_135_596_800, nanos: 0 }));
}
