//! Tasks that are spawned for later: stored as a scheduled run is, handed over on time and never before.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use absurd_client::{ClaimOptions, NewTask, Reason, SpawnOptions, Start, State, StreamOptions};
use absurd_proto::v1 as pb;
use absurd_server::settings::Settings;
use absurd_tests::{Server, in_time};
use serde_json::json as j;
use uuid::Uuid;

use crate::limits;

/// How late a task may come that a replica has spawned itself.
const LATE_MAX: Duration = Duration::from_millis(900);

fn later(ms: u64) -> SpawnOptions {
    SpawnOptions::default().delay(Duration::from_millis(ms))
}

/// Workers wait with credit all the while, so that whatever could be handed over early would be.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_for_later_comes_on_time_and_never_before() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute("select absurd.create_queue('p', 'partitioned')").await.unwrap();
    for queue in ["q", "p"] {
        let client = server.client().with_queue(queue.to_owned());
        let options = StreamOptions { max_in_flight: 100, ..StreamOptions::default() };
        let mut stream = client.claim_stream(options).await.unwrap();
        client.spawn_task("now", &j!(null), SpawnOptions::default()).await.unwrap();
        in_time("the stream is served", stream.next()).await.unwrap().complete(&j!(1)).await.unwrap();

        // One by one and together, with keys and without, by a delay and by a time, in no order; and some for much later.
        let mut due: HashMap<Uuid, (SystemTime, SystemTime)> = HashMap::new();
        let span = |began: SystemTime, ms| {
            let delay = Duration::from_millis(ms);
            (began + delay, SystemTime::now() + delay + LATE_MAX)
        };
        for ms in [900, 500, 700, 3_600_000] {
            let began = SystemTime::now();
            let one = client.spawn_task("one", &j!(null), later(ms)).await.unwrap();
            let keyed = later(ms + 30).idempotency_key(format!("k{ms}"));
            let with_key = client.spawn_task("keyed", &j!(null), keyed.clone()).await.unwrap();
            due.insert(one.task_id, span(began, ms));
            due.insert(with_key.task_id, span(began, ms + 30));
            let again = client.spawn_task("keyed", &j!(null), keyed).await.unwrap();
            assert_eq!((again.created, again.task_id), (false, with_key.task_id));
        }
        let began = SystemTime::now();
        let delays = [400, 1300, 600, 0, 3_600_000];
        let at = |ms| SpawnOptions::default().start_at(began + Duration::from_millis(ms));
        let tasks = delays.map(|ms| NewTask::new("many", &j!(null), at(ms)).unwrap());
        for (spawned, ms) in client.spawn_tasks(tasks.to_vec()).await.unwrap().iter().zip(delays) {
            due.insert(spawned.task_id, span(began, ms));
        }

        let read = format!(
            "select t.state, r.state, r.available_at - t.enqueue_at > '59 minutes', r.wake_event is null, r.claimed_by is null
                    and r.started_at is null and t.first_started_at is null, t.task_id
               from absurd.t_{queue} t join absurd.r_{queue} r using (task_id) where r.available_at > now() + '30 minutes'"
        );
        let stored = sql.query(&read, &[]).await.unwrap();
        assert_eq!(stored.len(), 3);
        for row in stored {
            let states: (&str, &str) = (row.get(0), row.get(1));
            assert_eq!(states, ("sleeping", "sleeping"), "as ScheduleTask leaves it");
            assert_eq!((row.get(2), row.get(3), row.get(4)), (true, true, true));
            due.remove(&row.get(5)).unwrap();
        }
        let mut ids: Vec<Uuid> = due.keys().copied().collect();
        let mut came = Vec::new();
        for _ in 0..ids.len() {
            let task = in_time("each of them comes", stream.next()).await.unwrap();
            let (now, (from, to)) = (SystemTime::now(), due[&task.task_id]);
            assert!(now >= from, "{} came {:?} too early", task.task_name, from.duration_since(now));
            assert!(now <= to, "{} on {queue} came {:?} late", task.task_name, now.duration_since(to - LATE_MAX));
            assert_eq!((task.attempt, task.wake_event.as_deref()), (1, None));
            came.push(task.task_id);
            task.complete(&j!(1)).await.unwrap();
        }
        came.sort();
        ids.sort();
        assert_eq!(came, ids, "each of them once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_over_is_at_once_and_a_wrong_one_names_its_field() {
    let server = Server::start().await;
    let client = server.client();
    let past = SpawnOptions::default().start_at(SystemTime::now() - Duration::from_secs(3600));
    for options in [past, later(0)] {
        client.spawn_task("n", &j!(null), options).await.unwrap();
        assert_eq!(client.claim_task(ClaimOptions::default()).await.unwrap().len(), 1);
    }
    let far = SpawnOptions::default().max_delay(Duration::from_secs(61)).delay(Duration::from_secs(60));
    let spawned = client.spawn_task("n", &j!(null), far).await.unwrap();
    assert_eq!(client.get_task_status(spawned.task_id).await.unwrap().unwrap().state, State::Sleeping);
    let soon = SystemTime::now() + Duration::from_secs(60);
    let useless =
        |start| SpawnOptions { start: Some(start), ..SpawnOptions::default().max_delay(Duration::from_secs(60)) };
    for options in [useless(Start::After(Duration::from_secs(60))), useless(Start::At(soon + Duration::from_secs(5)))] {
        let refused = client.spawn_task("n", &j!(null), options).await.unwrap_err();
        assert_eq!((refused.reason(), refused.field()), (Reason::InvalidArgument, Some("task.cancellation.max_delay")));
    }
    let mut grpc = server.raw().await;
    let span = |seconds, nanos| pb::new_task::Start::Delay(prost_types::Duration { seconds, nanos });
    let at = |seconds, nanos| pb::new_task::Start::StartAt(prost_types::Timestamp { seconds, nanos });
    for (start, field) in [
        (span(-1, 0), "tasks[1].delay"),
        (span(0, -1), "tasks[1].delay"),
        (span(400_000_000, 0), "tasks[1].delay"),
        (at(253_402_300_800, 0), "tasks[1].start_at"),
        (at(0, -1), "tasks[1].start_at"),
    ] {
        let task = pb::NewTask { task_name: "n".into(), ..Default::default() };
        let wrong = pb::NewTask { start: Some(start), ..task.clone() };
        let request = pb::SpawnTasksRequest { queue: "q".into(), tasks: vec![task, wrong] };
        let status = grpc.spawn_tasks(request).await.unwrap_err();
        let details = tonic_types::StatusExt::get_details_bad_request(&status).unwrap();
        assert_eq!(details.field_violations[0].field, field, "{status}");
    }
}

/// What cannot be claimed yet is no backlog, and a full backlog turns nothing away that is for later.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_for_later_are_no_backlog() {
    let server = limits::server(Settings { max_backlog: Some(3), ..Settings::default() }).await;
    let client = server.client();
    for _ in 0..5 {
        client.spawn_task("later", &j!(null), later(3_600_000)).await.unwrap();
    }
    for _ in 0..3 {
        client.spawn_task("now", &j!(null), SpawnOptions::default()).await.unwrap();
    }
    let mut grpc = server.raw().await;
    let task = pb::NewTask { task_name: "now".into(), ..Default::default() };
    let request = pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) };
    assert_eq!(grpc.spawn_task(request).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
    client.spawn_task("later", &j!(null), later(3_600_000)).await.unwrap();
}
