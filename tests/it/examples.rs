//! The client's examples, run as a reader would run them: what they print is what they promise.

use std::path::PathBuf;

use absurd_tests::{Server, binary, in_time, root};

/// Where the examples lie, which are built with the program.
fn built() -> PathBuf {
    binary().parent().unwrap().join("examples")
}

/// Runs an example on a server of its own and returns what it prints.
async fn run(name: &str) -> String {
    let program = built().join(name);
    let server = Server::start().await;
    let mut command = tokio::process::Command::new(program);
    command.current_dir(root());
    command.env("ABSURD_URL", server.url()).env_remove("ABSURD_DEFAULT_QUEUE").env_remove("ABSURD_WORKER_ID");
    let output = in_time(name, command.kill_on_drop(true).output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seed_s_examples_do_what_they_say() {
    let examples: [(&str, &[&str]); 11] = [
        (
            "basic_processing",
            &["completed echo: {\"output\":\"Processed: Hello, World!\"}", "failed sing: nobody knows how to do sing"],
        ),
        (
            "task_management",
            &[
                "the task is pending with {\"data\": \"value\", \"options\": {\"verbose\": true}}",
                "its run is pending, attempt 1",
                "claimable before its time: 0",
                "cancelled: true, the task is cancelled",
                "cancelled again: false",
            ],
        ),
        (
            "events",
            &[
                "the run sleeps until event \"data_ready\" comes",
                "emitted; 1 run woken",
                "received {\"processed_data\": \"some_value\"}",
                "the task is completed",
            ],
        ),
        (
            "checkpoints",
            &[
                "attempt 1 begins after step 0",
                "failed: the disk is full; another attempt follows: true",
                "attempt 2 begins after step 2",
                "the task is completed",
            ],
        ),
        (
            "workflow_tracking",
            &[
                "extract_data belongs to the pipeline: true",
                "data_pipeline 1.0.0 is Completed: {\"processed\": \"data from s3://bucket/data\"}",
            ],
        ),
        ("pooling", &["processed 20 tasks over one connection", "as expected: "]),
        (
            "retry_strategies",
            &[
                "unreliable_task: attempt 2 follows in 10 s",
                "another_unreliable_task: attempt 2 follows in 60 s",
                "hopeless_task: given up",
            ],
        ),
        (
            "cancellation_rules",
            &[
                "stored: {\"max_delay\": 3600, \"max_duration\": 7200}",
                "another_long_task: TASK_CANCELLED",
                "the task is cancelled",
            ],
        ),
        (
            "long_running",
            &["completed after 10 extensions, attempt 1", "completed after one and a half leases, attempt 1"],
        ),
        (
            "error_handling",
            &[
                "run sleeps: true, waiting for Some(\"data_ready\")",
                "TASK_CANCELLED: the task was cancelled: stop, report nothing",
                "INVALID_ARGUMENT in Some(\"task.task_name\"): our own mistake: mend the call",
                "RUN_NOT_FOUND: the run is not ours any more: stop, report nothing",
            ],
        ),
        (
            "validation",
            &[
                "invalid: queue_name: \"invalid-queue-name!\" must be a letter or an underscore",
                "invalid: queue_name: \"2nd_queue\"",
                "valid: valid_queue_name",
                "created: invalid-queue-name!",
                "invalid workflow_name: ",
            ],
        ),
    ];
    check(&examples).await;
}

/// Runs examples side by side; each must print these texts in their order.
async fn check(examples: &[(&str, &[&str])]) {
    let texts = futures_util::future::join_all(examples.iter().map(|(name, _)| run(name))).await;
    for ((name, lines), text) in examples.iter().zip(texts) {
        let mut rest = text.as_str();
        for line in *lines {
            let at = rest.find(line).unwrap_or_else(|| panic!("{name} does not print {line:?} in its turn: {text}"));
            rest = &rest[at + line.len()..];
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_of_durable_execution_do_what_they_say() {
    check(&[
        (
            "order_fulfillment",
            &[
                "charging 100\n",
                "reserving widget\n",
                "telling a@example.com about TRACK-1\n",
                "completed: {\"order_id\": \"pay-",
                "\"tracking_number\": \"TRACK-1\"}",
            ],
        ),
        (
            "agent_loop",
            &[
                "asking the model with 1 messages\n",
                "asking the model with 3 messages\n",
                // The second attempt asks nothing again.
                "asking the model with 5 messages\nasking the model with 7 messages\nthe answer is 40\n",
            ],
        ),
        (
            "batch_importer",
            &[
                "loading rows 400 to 600\nloading rows 600 to 800\nloading rows 800 to 1000\n1000 rows, sum 499500\n",
                "batch: 200 rows\nbatch#2: 400 rows\n",
                "batch#5: 1000 rows\n",
            ],
        ),
        (
            "saga",
            &[
                "booked flight\nbooked hotel\ncompleted: [\"flight-1\", \"hotel-1\"]\n",
                "booked flight\nbooked hotel\ncancelled hotel-1\ncancelled flight-1\nfailed: ",
                "no submarine is left",
            ],
        ),
        (
            "cron",
            &[
                "a second scheduler spawns the same task: true\n",
                "report; 2 to come\nreport; 1 to come\nreport; 0 to come\n",
            ],
        ),
        ("fan_out", &["the sum of 1000 squares is 333833500\n1001 tasks completed on one place\n"]),
    ])
    .await;
}

/// The migration guide has every method of the Python client, and names only methods that both flavours have.
#[test]
fn the_migration_guide_names_what_exists() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let guide = read("docs/migration.md");
    let sources: String = ["claims", "checkpoints", "client", "queues", "spawn", "tasks", "waits", "workflow"]
        .map(|name| read(&format!("client/src/{name}.rs")))
        .concat();
    let blocking = read("client/src/blocking.rs");
    let name = |cell: &str| cell.trim().trim_start_matches('`').split('(').next().unwrap_or_default().to_owned();
    let mut original = std::collections::BTreeSet::new();
    for row in guide.lines().filter(|line| line.starts_with("| `") && line.contains("conn")) {
        let cells: Vec<&str> = row.split('|').collect();
        let (theirs, ours) = (name(cells[1]), name(cells[2]));
        assert_eq!(theirs, ours, "the same name");
        assert!(sources.contains(&format!("pub async fn {ours}")), "{ours} does not exist");
        let both = [format!(" {ours}["), format!("fn {ours}")];
        assert!(both.iter().any(|text| blocking.contains(text.as_str())), "{ours} has no blocking flavour");
        original.insert(theirs);
    }
    assert_eq!(original.len(), 27, "{original:?}");
    for line in guide.lines().filter(|line| line.contains("client/examples/")) {
        let path = line.split("(../").nth(1).and_then(|rest| rest.split(')').next()).unwrap();
        assert!(root().join(path).exists(), "{path}");
    }
}
