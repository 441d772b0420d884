//! Command lines as people type them, right and wrong ones: exit code, and parts of both outputs.

use std::sync::Arc;

use absurd_client::SpawnOptions;
use absurd_tests::{Database, Server, binary, in_time};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A line for the shell, its exit code, parts of its standard output, parts of its standard error.
type Line = (&'static str, i32, &'static [&'static str], &'static [&'static str]);

const QUEUES: &[Line] = &[
    ("absurd queue create orders", 0, &["orders created"], &[]),
    ("absurd queue create -q mails", 0, &["mails created"], &[]),
    ("absurd queue create a1 --queue b1", 1, &[], &["two queues", "a1", "b1"]),
    ("absurd queue create same --queue same", 0, &["same created"], &[]),
    ("absurd queue create once && absurd queue create once", 0, &["once exists"], &[]),
    ("absurd queue create ''", 1, &[], &["queue"]),
    ("absurd queue stats q", 0, &["failed attempts", "oldest waits"], &[]),
    ("absurd queue stats nowhere", 1, &[], &["nowhere"]),
    ("absurd queue stats q -o json", 0, &["\"failed_runs\": 0"], &[]),
    ("absurd queue drop q", 1, &[], &["--yes"]),
    ("absurd queue create gone && absurd queue drop gone -y", 0, &["gone dropped"], &[]),
    ("absurd queue drop never --yes", 0, &["never did not exist"], &[]),
    ("absurd queue ls", 0, &["QUEUE", "unpartitioned", "PENDING"], &[]),
    ("absurd queue list -o json", 0, &["\"queue\": \"q\"", "\"running\": "], &[]),
    ("absurd queue list --no-counts -o json | grep -c running", 1, &["0"], &[]),
    ("absurd queue", 2, &[], &["Usage", "create"]),
    ("absurd queue make x", 2, &[], &["unrecognized subcommand 'make'"]),
];

const SPAWNS: &[Line] = &[
    ("absurd task spawn greet '{\"a\":1}'", 0, &["task_id", "created  true"], &[]),
    ("absurd task spawn greet", 0, &["task_id"], &[]),
    ("absurd task spawn", 2, &[], &["<NAME>"]),
    ("absurd task spawn ''", 1, &[], &["task_name"]),
    ("echo '{\"x\":1}' | absurd task spawn t -", 0, &["task_id"], &[]),
    ("absurd task spawn t @$FILES/params.json", 0, &["task_id"], &[]),
    ("absurd task spawn t @$FILES/none.json", 1, &[], &["params", "none.json", "No such file"]),
    ("absurd task spawn t $FILES/params.json", 1, &[], &["write @/"]),
    ("absurd task spawn t @", 1, &[], &["no file is named"]),
    ("absurd task spawn t '{bad'", 1, &[], &["params: not valid JSON", "  {bad\n   ^"]),
    ("absurd task spawn t world", 1, &[], &["'\"world\"'", "-P key=value"]),
    ("absurd task spawn t \"{'a': 1}\"", 1, &[], &["double quotes"]),
    ("absurd task spawn t '\"\\u0000\"'", 1, &[], &["JSON_INVALID"]),
    ("absurd task spawn t '{}' -P a=1", 2, &[], &["cannot be used with"]),
    ("absurd task spawn t -P a", 1, &[], &["KEY=TEXT"]),
    ("absurd task spawn t -P a:=b", 1, &[], &["-P a: not valid JSON"]),
    ("absurd task spawn t --headers '[1]'", 1, &[], &["must be a JSON object"]),
    ("echo '{\"h\":1}' | absurd task spawn t '{}' --headers -", 0, &["task_id"], &[]),
    ("absurd task spawn t - --headers -", 1, &[], &["cannot both come from standard input"]),
    ("absurd task spawn t --delay soon", 2, &[], &["15s, 30m or 1h"]),
    ("absurd task spawn t --at tomorrow", 2, &[], &["write it as 2027-01-01T00:00:00Z"]),
    ("absurd task spawn t --at 2099-01-01T00:00:00", 2, &[], &["+01:00"]),
    ("absurd task spawn t --delay 1h --at 2099-01-01T00:00:00Z", 2, &[], &["cannot be used with"]),
    ("absurd task spawn t --delay 2h --max-delay 1h", 1, &[], &["max_delay"]),
    ("absurd task spawn t --retry linear:1s", 2, &[], &["exponential:1s..5m"]),
    ("absurd task spawn t --max-attempts 0", 2, &[], &["0 is not in 1.."]),
    ("absurd task spawn t --unlimited-attempts --max-attempts 3", 2, &[], &["cannot be used with"]),
    ("absurd task spawn n --queue nowhere", 1, &[], &["absurd queue create nowhere"]),
    ("absurd task spawn t --count 3", 0, &["3 tasks in"], &[]),
    ("absurd task spawn t --count 2 --key k", 1, &[], &["--key names one task"]),
    ("absurd task spawn t --key k7 && absurd task spawn t --key k7", 0, &["created  false"], &[]),
    ("absurd task spawn t --wait 200ms", 1, &[], &["task 0", "has not ended within 200ms", "absurd task watch"]),
    ("absurd task spawn t --wait 2", 2, &[], &["15s, 30m or 1h"]),
];

/// `made` spawns a task with the given flags and shows what is stored of it.
const STORED: &[Line] = &[
    ("made", 0, &["\"max_attempts\": 5", "\"kind\": \"exponential\"", "\"first_started_at\": null"], &[]),
    ("made -P name=ann -P count:=42", 0, &["\"name\": \"ann\"", "\"count\": 42"], &[]),
    ("made --header region=eu --headers '{\"a\": 1}'", 0, &["\"region\": \"eu\"", "\"a\": 1"], &[]),
    ("made --retry fixed:10s --max-attempts 3", 0, &["\"base_seconds\": 10", "\"max_attempts\": 3"], &[]),
    ("made --max-attempts 3", 0, &["\"max_attempts\": 3", "\"retry_strategy\": null"], &[]),
    ("made --retry exponential:1s..1mx3", 0, &["\"factor\": 3", "\"max_seconds\": 60"], &[]),
    ("made --unlimited-attempts", 0, &["\"max_attempts\": null"], &[]),
    ("made --cancel-after 1h --max-delay 10m", 0, &["\"max_duration\": 3600", "\"max_delay\": 600"], &[]),
    ("made --at 2099-01-01T00:00:00+01:00", 0, &["2098-12-31T23:00:00.000Z", "\"state\": \"sleeping\""], &[]),
    ("made --delay 1h", 0, &["\"state\": \"sleeping\""], &[]),
    ("absurd task get $(absurd task spawn t --delay 1h -o json | id)", 0, &["starts in 59m", "0 of 5"], &[]),
];

const TASKS: &[Line] = &[
    ("absurd task get $TASK", 0, &["known", "0 of 1", "attempt 1 waits for a worker", "{\"n\": 1}"], &[]),
    ("absurd task get $TAIL", 0, &["known"], &[]),
    ("absurd task get $UPPER -o json", 0, &["\"task_name\": \"known\"", "\"runs\"", "\"waits\": []"], &[]),
    (
        "absurd task get $HEAD -q twins",
        1,
        &[],
        &["names 2 tasks", "write more of the id", "  twin  pending  queue twins"],
    ),
    ("absurd task get 01a2", 1, &[], &["too short", "6 characters"]),
    ("absurd task get greet", 1, &[], &["no id of a task", "absurd task list"]),
    ("absurd task get 00000000-0000-7000-8000-000000000000", 1, &[], &["no queue has a task 00000000"]),
    ("absurd queue create other && absurd task get $TASK -q other", 1, &[], &["is in queue \"q\", not in \"other\""]),
    ("ABSURD_DEFAULT_QUEUE=absent absurd task get $TASK", 0, &["known"], &["is in queue \"q\""]),
    ("ABSURD_DEFAULT_QUEUE= ABSURD_QUEUE=q absurd task list --name known", 0, &["known"], &[]),
    ("absurd task list --state done", 2, &[], &["possible values", "completed"]),
    ("absurd task list --limit 1 -o json", 0, &["\"task_id\""], &[]),
    ("absurd task list --limit many", 2, &[], &["invalid digit"]),
    ("absurd task cancel $(absurd task spawn t -o json | id)", 0, &["cancelled"], &[]),
    ("absurd task retry $TAIL", 1, &[], &["TASK_NOT_FAILED"]),
    ("absurd task watch $TASK --timeout 300ms", 1, &[], &["waits for a worker", "has not ended within 300ms"]),
    ("absurd event emit go1 '{\"x\":1}'", 0, &["emitted; 0 runs woken"], &[]),
    ("echo '{\"x\":1}' | absurd event emit go2 -", 0, &["emitted"], &[]),
    ("absurd event emit go3 @$FILES/params.json && absurd event emit go3", 0, &["the first payload stays"], &[]),
    ("absurd event emit go4 '{'", 1, &[], &["payload: not valid JSON", "  {\n   ^"]),
    ("absurd event emit", 2, &[], &["<NAME>"]),
];

const SERVERS: &[Line] = &[
    ("absurd health", 0, &["SERVING"], &[]),
    ("absurd health --url $PLACE", 0, &["SERVING"], &[]),
    ("absurd health --url $PLACE,$PLACE", 0, &["SERVING\n"], &[]),
    ("absurd health --url localhost:1", 1, &[], &["http://localhost:1", "connection refused", "absurd dev"]),
    ("absurd queue list --url $PLACE", 0, &["q"], &[]),
    ("absurd task list --url 127.0.0.1:1", 1, &[], &["http://127.0.0.1:1: connection refused", "trying again"]),
    ("absurd task list --url https://$PLACE", 1, &[], &["speaks plain HTTP", "write http://127.0.0.1"]),
    ("absurd task list --url postgresql://me:hunter2@h/db", 1, &[], &["the scheme \"postgresql\" is not http"]),
    ("absurd task list --url http://me:hunter2@127.0.0.1:1", 1, &[], &["must not hold a login"]),
    ("absurd health --url me:hunter2@127.0.0.1:1,$PLACE", 1, &[], &["must not hold a login"]),
    ("absurd task list --url ,", 1, &[], &["url: must not be empty"]),
    ("absurd serve", 1, &[], &["ABSURD_DATABASE_URL"]),
    ("absurd serve --listen 99999", 2, &[], &["\"99999\" is not a port"]),
    ("absurd dev --listen localhost", 2, &[], &["write it as localhost:50051"]),
    ("absurd dev --listen http://127.0.0.1:1", 2, &[], &["has no scheme"]),
    ("absurd dev --port 99999", 2, &[], &["99999"]),
    ("absurd migrate --check --database-url $DATABASE", 0, &["nothing to do"], &[]),
    ("absurd migrate --check --database-url $EMPTY", 2, &["to apply: "], &[]),
    ("absurd migrate --check --database-url postgresql://me:hunter2@127.0.0.1:1/x", 1, &[], &["error"]),
    ("absurd version", 0, &["absurd 0."], &[]),
    ("absurd --version", 0, &["absurd 0."], &[]),
    ("absurd completions bash", 0, &["complete -F _absurd"], &[]),
    ("absurd completions fish", 0, &["complete -c absurd"], &[]),
    ("absurd completions tcsh", 2, &[], &["possible values", "zsh"]),
    ("absurd", 2, &[], &["Usage", "Examples:"]),
    ("absurd wokrer", 2, &[], &["a similar subcommand exists: 'worker'"]),
    ("absurd help task spawn", 0, &["Examples:", "--delay"], &[]),
];

const WORKERS: &[Line] = &[
    ("absurd worker", 2, &[], &["--exec"]),
    ("absurd worker cat --exec cat", 2, &[], &["cannot be used with"]),
    ("absurd worker cat --concurrency 0", 2, &[], &["0 is not in 1..=1000"]),
    (
        "absurd queue create w1 && absurd task spawn t -P n:=7 -q w1 && absurd worker cat --max-tasks 1 -q w1",
        0,
        &[],
        &["takes tasks of queue \"w1\"", "completed after"],
    ),
    (
        "absurd queue create w2 && absurd task spawn t -q w2 && absurd worker -q w2 --max-tasks 1 -- printf '%s\\n' 'a  b' \
         && absurd task get $(absurd task list -q w2 -o json | id) -q w2",
        0,
        &["result    \"a  b\"", "completed"],
        &[],
    ),
    ("absurd step s -- true", 1, &[], &["absurd worker --exec"]),
    ("absurd sleep", 2, &[], &["SPAN"]),
    ("absurd sleep 1s", 1, &[], &["absurd worker --exec"]),
    ("absurd sleep --until noon", 2, &[], &["write it as 2027"]),
];

/// Readers that leave early, full disks, closed outputs.
const OUTPUTS: &[Line] = &[
    ("absurd task spawn t >/dev/full", 1, &[], &["cannot write to standard output", "No space left"]),
    ("absurd version >/dev/full", 1, &[], &["No space left"]),
    ("absurd task list -o json >/dev/full", 1, &[], &["No space left"]),
    ("{ absurd completions bash; echo code=$? >&2; } | head -1", 0, &[], &["code=0"]),
    ("{ absurd task spawn t; echo code=$? >&2; } | true", 0, &[], &["code=0"]),
    ("absurd task spawn t >&-", 0, &[], &[]),
    ("absurd task list --bogus 2>/dev/full", 2, &[], &[]),
    ("absurd task get 01a2 2>/dev/full", 1, &[], &[]),
    (
        "absurd queue create w3 && absurd task spawn t -q w3 && absurd worker cat --max-tasks 1 -q w3 2>/dev/full",
        0,
        &[],
        &[],
    ),
];

/// Words that the lines use: the id of JSON, and a task as it is stored.
const WORDS: &str = r#"
    id() { sed -n 's/.*"task_id": "\([^"]*\)".*/\1/p' | head -1; }
    made() { absurd task get "$(absurd task spawn t "$@" -o json | id)" -o json; }
"#;

async fn run(line: Line, variables: Arc<Vec<(&'static str, String)>>) -> Option<String> {
    let (text, code, outputs, errors) = line;
    let mut shell = Command::new("sh");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ABSURD_")) {
        shell.env_remove(name);
    }
    shell.args(["-c", &format!("{WORDS}\n{text}")]).envs(variables.iter().map(|(name, value)| (*name, value)));
    let output = in_time(text, shell.stdin(std::process::Stdio::null()).kill_on_drop(true).output()).await.unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&output.stdout), said(&output.stderr));
    let missing =
        |said: &str, parts: &[&str]| parts.iter().find(|part| !said.contains(**part)).map(ToString::to_string);
    let missing = missing(&out, outputs).or_else(|| missing(&err, errors));
    let wrong = ["panicked", "hunter2", "\u{1b}["].into_iter().find(|part| out.contains(part) || err.contains(part));
    let right = output.status.code() == Some(code) && missing.is_none() && wrong.is_none();
    (!right).then(|| {
        format!("{text}\n  {}, missing {missing:?}, wrong {wrong:?}\n--- out\n{out}--- err\n{err}", output.status)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_people_type_is_answered() {
    let server = Server::start().await;
    let empty = Database::empty().await;
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("params.json"), "{\"from\": \"a file\"}\n").unwrap();
    let client = server.client();
    let spawned = client.spawn_task("known", &serde_json::json!({"n": 1}), SpawnOptions::default()).await.unwrap();
    let twins = client.with_queue("twins");
    twins.create_queue().await.unwrap();
    for _ in 0..2 {
        twins.spawn_task("twin", &(), SpawnOptions::default()).await.unwrap();
    }
    let id = spawned.task_id.to_string();
    let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    let variables = Arc::new(vec![
        ("PATH", path),
        ("ABSURD_URL", server.url()),
        ("ABSURD_DEFAULT_QUEUE", "q".into()),
        ("PLACE", server.url().replace("http://", "")),
        ("FILES", files.path().to_string_lossy().into_owned()),
        ("DATABASE", server.database().url().to_owned()),
        ("EMPTY", empty.url().to_owned()),
        ("TAIL", id[id.len() - 8..].to_owned()),
        ("HEAD", id[..6].to_owned()),
        ("UPPER", id.to_uppercase()),
        ("TASK", id),
    ]);
    let lines = [QUEUES, SPAWNS, STORED, TASKS, SERVERS, WORKERS, OUTPUTS].concat();
    assert!(lines.len() >= 60, "{}", lines.len());
    let places = Arc::new(Semaphore::new(6));
    let mut running = JoinSet::new();
    for line in lines {
        let (places, variables) = (Arc::clone(&places), Arc::clone(&variables));
        running.spawn(async move {
            let _place = places.acquire_owned().await.unwrap();
            run(line, variables).await
        });
    }
    let wrong: Vec<String> = running.join_all().await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong.join("\n\n"));
}
