//! Databases with something wrong: `migrate`, `serve` and `doctor` say so at once, and callers hear what it is.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use absurd_client::SpawnOptions;
use absurd_proto::v1 as pb;
use absurd_server::app::App;
use absurd_server::settings::{Secret, Settings};
use absurd_server::store::migrate;
use absurd_tests::{Database, OwnCluster, Server, ServerOptions, absurd, eventually, in_time, json, raw};
use serde_json::json as j;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

fn parts(status: &Status) -> (Code, String, String) {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    (status.code(), reason, status.message().to_owned())
}

/// Standard output and errors of a command, and whether it succeeded.
async fn said(args: &[&str]) -> (bool, String) {
    let output = in_time(&args.join(" "), absurd(args).output()).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

async fn doctor(url: &str) -> (bool, String) {
    said(&["doctor", "--database-url", url]).await
}

/// The same database for another role.
fn url_of(database: &Database, role: &str) -> String {
    let (_, place) = database.url().split_once('@').unwrap();
    format!("postgresql://{role}@{place}")
}

async fn spawn(server: &Server, queue: &str, params: &str) -> Result<pb::SpawnedTask, Status> {
    let params = json(params);
    let task = pb::NewTask { task_name: "n".into(), params, max_attempts: Some(1), ..Default::default() };
    let request = pb::SpawnTaskRequest { queue: queue.into(), task: Some(task) };
    server.raw().await.spawn_task(request).await.map(|answer| answer.into_inner().task.unwrap())
}

/// A row that a user's own constraint refuses is named by its constraint, and by nothing that is in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_row_is_not_told() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute("alter table absurd.t_q add constraint only_numbers check (params::text !~ 'canary')")
        .await
        .unwrap();
    let (code, reason, message) = parts(&spawn(&server, "q", "\"canary\"").await.unwrap_err());
    assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "DATABASE_REFUSED"), "{message}");
    assert!(message.contains("only_numbers") && !message.contains("canary"), "{message}");
}

/// Escapes of letters need UTF-8 in older releases of Postgres, and letters need an encoding that has them.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_another_encoding_refuses_at_once_and_still_fails_runs() {
    let cluster = OwnCluster::start(&[]).await;
    let admin = cluster.database().await.connect().await;
    for (name, encoding) in [("ascii", "SQL_ASCII"), ("latin", "LATIN1")] {
        let create =
            format!("create database {name} encoding '{encoding}' template template0 lc_collate 'C' lc_ctype 'C'");
        admin.batch_execute(&create).await.unwrap();
        let url = cluster.url(name);
        migrate::migrate(&url.parse().unwrap(), migrate::Options::default()).await.unwrap();
        let settings = Settings { database_url: Some(Secret::from(url.as_str())), ..Settings::default() };
        let options = ServerOptions { settings, ..ServerOptions::default() };
        let server = Server::start_with(cluster.database_named(name), options).await;
        let began = Instant::now();
        let refused = spawn(&server, "q", "\"\\u6f22\"").await.map_err(|status| parts(&status));
        // SQL_ASCII takes escapes from release 16 on only if they are ASCII; LATIN1 has no such letter.
        let refused = refused.unwrap_err();
        assert_eq!((refused.0, refused.1.as_str()), (Code::InvalidArgument, "JSON_INVALID"), "{encoding}: {refused:?}");
        assert!(began.elapsed() < Duration::from_secs(3), "{encoding}: {:?}", began.elapsed());
        let mut grpc = server.raw().await;
        for (item, reason) in [(false, "{\"message\": \"\\u6f22\"}"), (true, "{\"message\": \"\\u6f22x\"}")] {
            spawn(&server, "q", "1").await.unwrap();
            let claimed = server.client().claim_task(absurd_client::ClaimOptions::default()).await.unwrap();
            let [held] = claimed.as_slice() else { panic!("{encoding}: {}", claimed.len()) };
            let token = held.claim_token().to_owned();
            if item {
                let items = [
                    pb::settle_item::Action::Extend(pb::ExtendAction {
                        extend_by: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
                    }),
                    pb::settle_item::Action::Fail(pb::FailAction { reason: json(reason), ..Default::default() }),
                ];
                let items = items.map(|action| pb::SettleItem {
                    claim_token: Some(token.clone()),
                    action: Some(action),
                    ..Default::default()
                });
                let request = pb::SettleTasksRequest { queue: "q".into(), items: items.to_vec() };
                let answer = grpc.settle_tasks(request).await.unwrap().into_inner();
                assert!(answer.results.iter().all(|result| result.error.is_none()), "{encoding}: {answer:?}");
            } else {
                let request = pb::FailTaskRequest {
                    queue: "q".into(),
                    claim_token: Some(token),
                    reason: json(reason),
                    ..Default::default()
                };
                grpc.fail_task(request).await.unwrap_or_else(|status| panic!("{encoding}: {status:?}"));
            }
            let run = server.client().get_run_status(held.run_id).await.unwrap().unwrap();
            assert_eq!(run.state, absurd_client::State::Failed, "{encoding}");
        }
        let (well, text) = doctor(&url).await;
        assert!(!well && text.contains(&format!("encoding is {encoding}")), "{text}");
    }
}

/// What the server's role may not do, and what was taken from a queue, is named; other queues go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_cannot_be_used_says_why() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let role = format!("app_{}", server.database().name());
    sql.batch_execute(&format!(
        "create role {role} login; grant usage on schema absurd, absurd_server to {role};
         grant all on all tables in schema absurd, absurd_server to {role};
         grant all on all functions in schema absurd, absurd_server to {role}"
    ))
    .await
    .unwrap();
    for queue in ["norights", "noselect", "nocolumn", "notable", "noindex", "rows", "forced"] {
        server.client().with_queue(queue).create_queue().await.unwrap();
        sql.batch_execute(
            &["t", "r", "c", "e", "w"].map(|kind| format!("grant all on absurd.{kind}_{queue} to {role};")).concat(),
        )
        .await
        .unwrap();
    }
    sql.batch_execute(&format!(
        "revoke all on absurd.t_norights from {role};
         revoke insert on absurd.r_noselect from {role};
         alter table absurd.t_nocolumn rename column params to parameters;
         drop table absurd.r_notable;
         alter table absurd.t_rows enable row level security;
         alter table absurd.t_forced enable row level security;
         create policy p on absurd.t_forced for all to {role} using (true) with check (task_name <> 'n')"
    ))
    .await
    .unwrap();
    let url = url_of(server.database(), &role);
    let settings = Settings { database_url: Some(Secret::from(url.as_str())), ..Settings::default() };
    let options = ServerOptions { settings, without_queue: true, ..ServerOptions::default() };
    let other = Server::start_with(server.database().clone(), options).await;
    for (queue, reason, named) in [
        ("norights", "DATABASE_PERMISSION", "t_norights"),
        ("noselect", "DATABASE_PERMISSION", "r_noselect"),
        ("nocolumn", "QUEUE_DAMAGED", "params"),
        ("notable", "QUEUE_DAMAGED", "r_notable"),
        ("rows", "DATABASE_REFUSED", "row-level security"),
        ("forced", "DATABASE_REFUSED", "row-level security"),
    ] {
        let began = Instant::now();
        let refused = parts(&spawn(&other, queue, "1").await.unwrap_err());
        assert_eq!((refused.0, refused.1.as_str()), (Code::FailedPrecondition, reason), "{queue}: {refused:?}");
        assert!(refused.2.contains(named), "{queue}: {refused:?}");
        assert!(began.elapsed() < Duration::from_secs(2), "{queue}: {:?}", began.elapsed());
    }
    let refused = parts(&spawn(&other, "nowhere", "1").await.unwrap_err());
    assert_eq!(refused.1, "QUEUE_NOT_FOUND");
    spawn(&other, "noindex", "1").await.unwrap();
    let (well, text) = doctor(&url).await;
    assert!(!well, "{text}");
    for part in [
        "may not select, insert, update, delete absurd.\"t_norights\"",
        "may not insert absurd.\"r_noselect\"",
        "queue \"notable\" has no table absurd.\"r_notable\"",
        "row security hides or refuses rows of absurd.\"t_rows\"",
        "grant insert on absurd.\"r_noselect\"",
        "absurd.\"t_nocolumn\" lacks params",
    ] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    other.stop().await;
    server.stop().await;
}

/// The schemas are gone under a running server.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_schemas_a_server_asks_for_a_migration() {
    for schema in ["absurd", "absurd_server"] {
        let server = Server::start().await;
        let sql = server.database().connect().await;
        sql.batch_execute(&format!("drop schema {schema} cascade")).await.unwrap();
        let mut grpc = server.raw().await;
        let told = |refused: Status| {
            let (code, reason, message) = parts(&refused);
            assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "SCHEMA_MISSING"), "{schema}: {refused:?}");
            assert!(message.contains(&format!("{schema} is gone")) && message.contains("absurd migrate"), "{message}");
        };
        if schema == "absurd" {
            let create = pb::CreateQueueRequest { queue: "new".into(), ..Default::default() };
            told(grpc.create_queue(create).await.unwrap_err());
            told(grpc.list_queues(pb::ListQueuesRequest::default()).await.unwrap_err());
            told(spawn(&server, "q", "1").await.unwrap_err());
            told(grpc.list_tasks(pb::ListTasksRequest { queue: "q".into(), ..Default::default() }).await.unwrap_err());
        } else {
            let emit = pb::EmitEventRequest { queue: "q".into(), event_name: "e".into(), ..Default::default() };
            told(grpc.emit_event(emit).await.unwrap_err());
            told(grpc.list_workflow_runs(pb::ListWorkflowRunsRequest::default()).await.unwrap_err());
        }
    }
}

/// A role with fewer connections than the server would take: calls wait for those that are open.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_house_is_no_dead_one() {
    let cluster = OwnCluster::start(&[]).await;
    let database = cluster.database().await;
    let admin = database.connect().await;
    admin
        .batch_execute(
            "create role app login; alter database own owner to app; drop schema absurd, absurd_server cascade",
        )
        .await
        .unwrap();
    let url = url_of(&database, "app");
    migrate::migrate(&url.parse().unwrap(), migrate::Options::default()).await.unwrap();
    admin.batch_execute("alter role app connection limit 6").await.unwrap();
    let settings =
        Settings { database_url: Some(Secret::from(url.as_str())), max_connections: Some(16), ..Settings::default() };
    let server = Server::start_with(database.clone(), ServerOptions { settings, ..ServerOptions::default() }).await;
    let call = async |n: usize| {
        let mut grpc = server.raw().await;
        match n % 4 {
            0 => drop(spawn(&server, "q", "1").await.unwrap()),
            1 => drop(grpc.get_queue_stats(pb::GetQueueStatsRequest { queue: "q".into() }).await.unwrap()),
            2 => drop(grpc.list_tasks(pb::ListTasksRequest { queue: "q".into(), ..Default::default() }).await.unwrap()),
            _ => drop(
                grpc.cleanup_tasks(pb::CleanupTasksRequest {
                    queue: "q".into(),
                    ttl: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
                    ..Default::default()
                })
                .await
                .unwrap(),
            ),
        }
    };
    for _ in 0..5 {
        in_time("all calls", futures_util::future::join_all((0..40).map(call))).await;
    }
    // With none that is open there is nothing to wait for.
    admin
        .batch_execute(
            "alter role app connection limit 0;
             select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'",
        )
        .await
        .unwrap();
    let began = Instant::now();
    let mut grpc = server.raw().await;
    let gone = parts(&grpc.list_queues(pb::ListQueuesRequest::default()).await.unwrap_err());
    assert_eq!((gone.0, gone.1.as_str()), (Code::Unavailable, "UNAVAILABLE"), "{gone:?}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    admin.batch_execute("alter role app connection limit 6").await.unwrap();
    eventually("it serves again", || async { spawn(&server, "q", "1").await.ok() }).await;
}

/// Calls that need a whole table wait until their deadline, and say what they waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_waits_for_a_lock_until_its_deadline() {
    let server = Server::start().await;
    server.client().spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let mut sql = server.database().connect().await;
    let reader = sql.transaction().await.unwrap();
    reader.batch_execute("select from absurd.t_q").await.unwrap();
    let drop_queue = async |limit: u64| {
        let mut request = tonic::Request::new(pb::DropQueueRequest { queue: "q".into() });
        request.set_timeout(Duration::from_secs(limit));
        let began = Instant::now();
        (server.raw().await.drop_queue(request).await.map_err(|status| parts(&status)), began.elapsed())
    };
    let (refused, took) = drop_queue(7).await;
    let refused = refused.unwrap_err();
    assert!(took > Duration::from_millis(6500), "answered after {took:?}: {refused:?}");
    assert_eq!((refused.0, refused.1.as_str()), (Code::Unavailable, "QUEUE_LOCKED"), "{refused:?}");
    let ends = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        reader.rollback().await.unwrap();
    };
    let ((), (dropped, _)) = tokio::join!(ends, drop_queue(30));
    assert!(dropped.unwrap().into_inner().dropped);
}

/// Functions that cannot be loaded any more, as after an upgrade of the packages under a running Postgres.
#[tokio::test(flavor = "multi_thread")]
async fn a_library_that_does_not_load_is_named() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute("update pg_proc set probin = '$libdir/nowhere' where proname like 'plpgsql%handler'")
        .await
        .unwrap();
    for args in [["migrate"], ["doctor"], ["serve"]] {
        let args = [args.as_slice(), &["--database-url", server.database().url()]].concat();
        let (well, text) = said(&args).await;
        assert!(!well && text.contains("PL/pgSQL does not run in it") && text.contains("nowhere"), "{args:?}: {text}");
    }
    sql.batch_execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()")
        .await
        .unwrap();
    eventually("a call says so", || async {
        let refused = parts(
            &server
                .raw()
                .await
                .create_queue(pb::CreateQueueRequest { queue: "x".into(), ..Default::default() })
                .await
                .unwrap_err(),
        );
        (refused.1 == "DATABASE_BROKEN").then_some(())
    })
    .await;
}

/// `PgBouncer`, as a service of the operating system runs it.
struct Bouncer {
    child: tokio::process::Child,
    home: tempfile::TempDir,
}

impl Bouncer {
    async fn start(database: &Database, mode: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let config: tokio_postgres::Config = database.url().parse().unwrap();
        let Some(tokio_postgres::config::Host::Unix(socket)) = config.get_hosts().first() else { panic!("a socket") };
        let dir = home.path().display();
        let text = format!(
            "[databases]\n* = host={} port={} user=absurd\n[pgbouncer]\nlisten_addr=\nunix_socket_dir={dir}\n\
             listen_port=6432\nauth_type=any\npool_mode={mode}\nignore_startup_parameters=options\n\
             logfile={dir}/log\npidfile={dir}/pid\n",
            socket.display(),
            config.get_ports().first().unwrap_or(&5432),
        );
        let ini = home.path().join("pgbouncer.ini");
        std::fs::write(&ini, text).unwrap();
        let program =
            ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].map(PathBuf::from).into_iter().find(|path| path.exists());
        let mut command = tokio::process::Command::new(program.expect("run tests/setup first: it installs pgbouncer"));
        if std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0) {
            command.args(["-u", "postgres"]);
        }
        let child = command.arg("-q").arg(&ini).kill_on_drop(true).stdout(Stdio::null()).spawn().unwrap();
        let socket = home.path().join(".s.PGSQL.6432");
        eventually("pgbouncer listens", || async { Path::new(&socket).exists().then_some(()) }).await;
        Self { child, home }
    }

    fn url(&self, database: &Database) -> String {
        format!("postgresql://absurd@/{}?host={}&port=6432", database.name(), self.home.path().display())
    }
}

/// A pooler in transaction mode is recognized at the first start; one in session mode serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_transaction_mode_is_refused_in_one_sentence() {
    let database = Database::new().await;
    for mode in ["transaction", "statement"] {
        let mut bouncer = Bouncer::start(&database, mode).await;
        let url = bouncer.url(&database);
        for args in [vec!["serve", "--listen-database-url", database.url()], vec!["migrate"], vec!["doctor"]] {
            let args = [args.as_slice(), &["--database-url", &url]].concat();
            let (well, text) = said(&args).await;
            assert!(
                !well && text.contains("a pooler in") && text.contains("pool_mode=session"),
                "{mode} {args:?}: {text}"
            );
            assert_eq!(text.trim().lines().count(), 1, "{text}");
        }
        bouncer.child.kill().await.unwrap();
    }
    let bouncer = Bouncer::start(&database, "session").await;
    let settings = Settings {
        database_url: Some(Secret::from(bouncer.url(&database).as_str())),
        listen: Some(([127, 0, 0, 1], 0).into()),
        max_connections: Some(4),
        ..Settings::default()
    };
    let app = App::start(settings.into_app_options().unwrap()).await.unwrap();
    let mut grpc = raw(&format!("http://{}", app.addr())).await;
    grpc.create_queue(pb::CreateQueueRequest { queue: "q".into(), ..Default::default() }).await.unwrap();
    app.shut_down().await.unwrap();
}

/// Why nothing could be done, down to the last cause, by every command that connects.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_fails_tells_the_whole_chain() {
    for command in ["migrate", "doctor", "serve"] {
        for (url, part) in [
            ("postgresql://app:canary@127.0.0.1:1/d", "refused"),
            ("postgresql://app:canary@no.such.host.invalid/d", "lookup"),
            ("postgresql://app:canary@h/d?sslmode=require", "without TLS"),
            ("postgresql://app:canary@h/d?channel_binding=require", "channel_binding"),
            ("postgresql://app:canary@%2Fnowhere/d", "No such file"),
        ] {
            let (well, text) = said(&[command, "--database-url", url]).await;
            assert!(!well && text.contains(part) && !text.contains("canary"), "{command} {url}: {text}");
        }
    }
}

/// A caller that waits for a result when its replica leaves is told to go to another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_a_result_ends_with_the_replica() {
    let server = Server::start().await;
    let spawned = server.client().spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let mut grpc = server.raw().await;
    let waiting = tokio::spawn(async move {
        let timeout = Some(prost_types::Duration { seconds: 60, nanos: 0 });
        let request = pb::AwaitTaskResultRequest { queue: "q".into(), task_id: spawned.task_id.to_string(), timeout };
        grpc.await_task_result(request).await
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    in_time("it stops", server.stop()).await;
    let told = parts(&in_time("an answer", waiting).await.unwrap().unwrap_err());
    assert_eq!((told.0, told.1.as_str()), (Code::Unavailable, "SHUTTING_DOWN"), "{told:?}");
}
