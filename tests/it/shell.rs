//! Durable steps from a shell: `absurd step`, `sleep`, `await-event`, `emit` inside of `absurd worker --exec`.

use absurd_client::{AbsurdClient, Json, SpawnOptions, State, TaskResult};
use absurd_tests::{Absurd, PATIENCE, Server, absurd, eventually, in_time, root};
use serde_json::{Value, json as j};
use uuid::Uuid;

async fn worker(server: &Server, program: &str) -> Absurd {
    let mut command = absurd(&["worker", "--exec", program, "--concurrency", "4", "--claim-timeout", "5s"]);
    command.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut worker = Absurd::start(command);
    worker.line("takes tasks").await;
    worker
}

async fn end(client: &AbsurdClient, task_id: Uuid) -> TaskResult {
    client.await_task_result(task_id, Some(PATIENCE)).await.unwrap()
}

async fn result(client: &AbsurdClient, task_id: Uuid) -> Value {
    let end = end(client, task_id).await;
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    end.result.unwrap().to().unwrap()
}

async fn waits_for(client: &AbsurdClient, run_id: Uuid, event: &str) {
    eventually("it waits for the event", || async {
        let run = client.get_run_status(run_id).await.unwrap().unwrap();
        (run.wake_event.as_deref() == Some(event)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_fulfilled_by_a_script() {
    let server = Server::start().await;
    let client = server.client();
    let script = root().join("docs/examples/order_fulfillment.sh");
    let mut worker = worker(&server, &script.to_string_lossy()).await;
    let order = j!({"order_id": "42", "amount": 100, "items": ["widget", "nut"], "email": "a@example.com"});
    let options = SpawnOptions::default().max_attempts(1);
    let spawned = client.spawn_task("order-fulfillment", &order, options).await.unwrap();
    worker.line("charging 100").await;
    worker.line("suspended").await;
    waits_for(&client, spawned.run_id, "shipment.packed:42").await;
    client.emit_event("shipment.packed:42", &j!({"tracking_number": "TRACK-42"})).await.unwrap();
    let next = worker.line("").await;
    assert_eq!(next, "reserved widget,nut", "the payment is not charged again, and what a step printed comes back");
    assert_eq!(result(&client, spawned.task_id).await, j!({"order_id": "pay-42", "tracking_number": "TRACK-42"}));
    let stored = client.get_all_checkpoints(spawned.task_id, spawned.run_id).await.unwrap();
    let stored: Vec<(&str, &str)> = stored
        .iter()
        .map(|stored| (stored.checkpoint_name.as_str(), stored.state.as_ref().map_or("", Json::as_str)))
        .collect();
    assert_eq!(
        stored,
        [
            ("process-payment", "{\"id\": \"pay-42\", \"amount\": 100}"),
            ("reserve-inventory", "\"reserved widget,nut\""),
            ("$awaitEvent:shipment.packed:42", "{\"tracking_number\": \"TRACK-42\"}"),
            ("send-notification", "\"to a@example.com: TRACK-42\""),
        ]
    );
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}

/// Repeated names, a failing command, a sleep, a wait that times out, an emission; and a program that ignores all exit codes.
#[tokio::test(flavor = "multi_thread")]
async fn a_script_has_all_that_a_handler_has() {
    let server = Server::start().await;
    let client = server.client();
    let home = tempfile::tempdir().unwrap();
    let script = home.path().join("task.sh");
    let text = r#"
        log=$1
        one=$(absurd step same -- sh -c "echo one >>$log; echo 1")
        two=$(absurd step same -- sh -c "echo two >>$log; printf '\"text\"'")
        none=$(absurd step none -- true)
        absurd step may-fail -- sh -c "test $ABSURD_ATTEMPT -gt 1 || exit 7" || exit $?
        absurd sleep 300ms
        echo awake >>$log
        absurd await-event never --timeout 0s; late=$?
        absurd emit "said:$ABSURD_TASK_ID" "{\"by\": \"$ABSURD_TASK_NAME\"}"
        go=$(absurd await-event go --step wait)
        echo "{\"one\": $one, \"two\": \"$two\", \"none\": \"$none\", \"late\": $late, \"go\": $go}"
    "#;
    std::fs::write(&script, text).unwrap();
    let log = home.path().join("log");
    let worker = worker(&server, &format!("sh {} {}", script.display(), log.display())).await;
    let spawned = client.spawn_task("story", &j!(null), SpawnOptions::default().max_attempts(2)).await.unwrap();
    let run = eventually("the second attempt", || async {
        let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
        (task.attempts == 2).then_some(task.last_attempt_run.unwrap())
    })
    .await;
    let first = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
    let reason: Value = first.failure_reason.unwrap().to().unwrap();
    assert_eq!((&reason["name"], &reason["message"]), (&j!("ExitError"), &j!("exit status: 7")));
    waits_for(&client, run, "go").await;
    client.emit_event("go", &j!([1, 2])).await.unwrap();
    let expected = j!({"one": 1, "two": "text", "none": "", "late": 124, "go": [1, 2]});
    assert_eq!(result(&client, spawned.task_id).await, expected);
    let said = format!("said:{}", spawned.task_id);
    assert!(!client.emit_event(&said, &j!(null)).await.unwrap().applied, "it was emitted");
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(log, "one\ntwo\nawake\nawake\n", "each step once; what is not a step, each time");
    let names: Vec<String> = client
        .get_all_checkpoints(spawned.task_id, run)
        .await
        .unwrap()
        .into_iter()
        .map(|stored| stored.checkpoint_name)
        .collect();
    assert_eq!(names, ["same", "same#2", "none", "may-fail", "sleep", "wait"]);
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}

/// The words of a program outside of a task, and for values that the server refuses.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_uses_say_what_is_wrong() {
    let output = in_time("it ends", absurd(&["step", "s", "--", "true"]).output()).await.unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("absurd worker --exec"), "{error}");
    let server = Server::start().await;
    let client = server.client();
    let program = r#"
        set -e
        case $ABSURD_TASK_NAME in
        large) absurd step large -- sh -c "yes | head -c 2000000" ;;
        escaped) absurd step escaped -- sh -c "head -c 4000000 /dev/zero | tr '\\0' '\\1'" ;;
        blank) absurd step " " -- true ;;
        missing) absurd step s -- /no/such/program ;;
        killed) absurd step s -- sh -c 'kill -9 $$' ;;
        esac
    "#;
    let worker = worker(&server, program).await;
    for (name, message) in [
        ("large", "at most 1048576 are allowed"),
        ("escaped", "bytes as JSON"),
        ("blank", "must not be blank"),
        ("missing", "cannot run \"/no/such/program\""),
        ("killed", "exit status: 137"),
    ] {
        let spawned = client.spawn_task(name, &j!(null), SpawnOptions::default()).await.unwrap();
        let end = end(&client, spawned.task_id).await;
        let failure: Value = end.failure.unwrap().to().unwrap();
        assert!(failure["message"].as_str().unwrap().contains(message), "{failure}");
    }
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}
