//! The running server: starts all parts, serves, and shuts the parts down in order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use absurd_proto::v1::absurd_service_server::AbsurdServiceServer;
use absurd_proto::v1::test_clock_service_server::TestClockServiceServer;
use anyhow::Context as _;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio_postgres::Config;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::awaited;
use crate::dispatch::DispatchOptions;
use crate::domain::QueueName;
use crate::doorbell;
use crate::engine::{Engine, EngineOptions};
use crate::gate::{self, Gate, GateOptions};
use crate::hints::Hints;
use crate::http;
use crate::maintenance;
use crate::metrics;
use crate::scope::Caller;
use crate::store::connect;
use crate::store::migrate::{self, Origin, Report};
use crate::store::{Store, StoreOptions};
use crate::transport::admission::{AdmissionLayer, AdmissionOptions};
use crate::transport::compression::CompressionLayer;
use crate::transport::test_clock::TestClock;
use crate::transport::{Limits, Service, refusal};
use crate::upkeep;

/// Service name in health checks.
const SERVICE: &str = "absurd.v1.AbsurdService";
/// Pause before a background task that ended is restarted.
const PART_PAUSE: Duration = Duration::from_secs(1);
/// The replica reports unhealthy when its last reading of the database's clock is this old.
const DATABASE_SILENCE: Duration = Duration::from_secs(6);
/// Age of the last clock reading from which on the health watch reads the clock itself.
const CLOCK_LATE: Duration = Duration::from_secs(2);
/// Default interval between upkeep rounds of a queue.
const UPKEEP_EVERY: Duration = Duration::from_secs(3600);

/// Options of a server.
#[derive(Debug, Clone)]
pub struct AppOptions {
    /// Connection settings of the database; the password is never printed.
    pub database: Config,
    /// Direct connection for LISTEN, for a `database` that goes through a pooler. None: `database`.
    pub listen_database: Option<Config>,
    /// Address to serve on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Unpartitioned queue that is created, if missing, before the server reports healthy.
    pub queue: Option<QueueName>,
    /// How to migrate before serving. None: no migration.
    pub migrate: Option<migrate::Options>,
    /// Whether to use the doorbell, if the database has one.
    pub doorbell: bool,
    /// Interval between upkeep rounds; zero: never. None: hourly in databases of ours, never in adopted ones.
    pub upkeep: Option<Duration>,
    /// Maximum number of connections to the database.
    pub connections_max: usize,
    /// Longest wait for a free connection.
    pub connection_wait_max: Duration,
    /// Bounds on client connections.
    pub gate: GateOptions,
    /// Bounds on calls.
    pub admission: AdmissionOptions,
    /// Bounds on waiting writes and tasks, and the pace of looks.
    pub engine: EngineOptions,
    /// Address of the metrics endpoint; None: no endpoint.
    pub metrics_listen: Option<SocketAddr>,
    /// Bounds and periods of claim streams.
    pub dispatch: DispatchOptions,
    /// Bounds on the content of requests.
    pub limits: Limits,
    /// PEM files of the certificate and the key; None: no TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Longest graceful shutdown; then open calls are cut.
    pub shutdown_grace: Duration,
    /// Whether tests may set the time over gRPC.
    pub test_clock: bool,
}

/// A running server.
#[derive(Debug)]
pub struct App {
    addr: SocketAddr,
    metrics_addr: Option<SocketAddr>,
    engine: Arc<Engine>,
    migrated: Option<Report>,
    health: Health,
    loops: JoinSet<()>,
    outdated: Arc<Notify>,
    admission: AdmissionLayer,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    grace: Duration,
}

impl App {
    /// Reads the certificate, migrates if asked, checks the database, binds, and serves.
    pub async fn start(options: AppOptions) -> anyhow::Result<Self> {
        // Read first, so that a bad file fails the start before the migration.
        let server = server(options.tls.as_ref(), options.limits.header_list_bytes_max)?;
        let migrated = match options.migrate {
            Some(how) => Some(migrate::migrate(&options.database, how).await.context("cannot migrate the database")?),
            None => None,
        };
        let known = inspect(&options.database).await?;
        let doorbell = known.doorbell && options.doorbell;
        let upkeep = upkeep_every(options.upkeep, known.origin);
        let store = Store::new(StoreOptions {
            database: options.database.clone(),
            connections_max: options.connections_max,
            wait_max: options.connection_wait_max,
            test_clock: options.test_clock,
        })?;
        let hints = Arc::new(Hints::new(replica_id(), doorbell));
        // The first look reads the database's clock, which minted ids need. It also counts the other replicas, which
        // are notified from the first write on.
        let first = store.tick(&[], hints.replica_id()).await;
        let first = first.map_err(|fault| anyhow::anyhow!("cannot use the database: {fault}"))?;
        hints.note_others(first.others);
        let engine = Arc::new(Engine::new(store, hints, options.dispatch, options.engine));
        if let Some(queue) = options.queue {
            let scope = Caller::anonymous().scope(queue);
            engine.store.queue_create(&scope, "unpartitioned", None).await?;
            engine.hang_doorbells(&[scope.queue().as_str()]).await;
        }
        let listener =
            TcpListener::bind(options.listen).await.with_context(|| format!("cannot listen on {}", options.listen))?;
        let addr = listener.local_addr()?;
        metrics::install();
        let gate = Gate::new(options.gate);
        let (tell, accepted) = gate::channel();
        let mut loops = JoinSet::new();
        loops.spawn(Arc::clone(&gate).accept(listener, tell));
        loops.spawn(Arc::clone(&gate).watch());
        let ready = Arc::new(AtomicBool::new(true));
        let mut metrics_addr = None;
        if let Some(address) = options.metrics_listen {
            let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
            metrics_addr = Some(listener.local_addr()?);
            let is_ready = Arc::clone(&ready);
            let is_ready = Arc::new(move || is_ready.load(Ordering::Relaxed));
            loops.spawn(http::serve(listener, Arc::clone(&engine), Arc::clone(&gate), is_ready));
        }
        let (health, health_service) = tonic_health::server::health_reporter();
        let health = Health { reporter: health, ready };
        let outdated = Arc::new(Notify::new());
        start_loops(&mut loops, &engine, options.listen_database.unwrap_or(options.database));
        let (store, watched, tell_outdated) = (engine.store.clone(), health.clone(), Arc::clone(&outdated));
        loops.spawn(async move { watch_database(&store, &watched, &tell_outdated).await });
        if !upkeep.is_zero() {
            let parts = Arc::clone(&engine);
            loops.spawn(keep_up("upkeep", parts, move |parts| async move { upkeep::run(&parts, upkeep).await }));
        }
        health.set(true).await;
        let (stop, stopped) = oneshot::channel();
        let test_clock = options.test_clock.then(|| TestClockServiceServer::new(TestClock::new(Arc::clone(&engine))));
        let admission = AdmissionLayer::new(options.admission);
        let router = server
            .layer(admission.clone())
            .layer(CompressionLayer)
            .layer(refusal::RefusalLayer { request_bytes_max: options.limits.request_bytes_max })
            .add_service(health_service)
            .add_service(reflection(options.test_clock)?.build_v1()?)
            .add_service(reflection(options.test_clock)?.build_v1alpha()?)
            .add_service(service(Arc::clone(&engine), options.limits))
            .add_optional_service(test_clock);
        let incoming = ReceiverStream::new(accepted);
        let serving = tokio::spawn(router.serve_with_incoming_shutdown(incoming, async {
            let _ = stopped.await;
        }));
        let grace = options.shutdown_grace;
        Ok(Self { addr, metrics_addr, engine, migrated, health, loops, outdated, admission, stop, serving, grace })
    }

    /// Address that the gRPC server is bound to, with the real port if 0 was asked for.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Address of the metrics endpoint; None: there is none.
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics_addr
    }

    /// The engine, for `absurd dev` and for tests.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Calls in flight, including claim streams.
    pub fn calls(&self) -> usize {
        self.admission.calls()
    }

    /// Report of the migration at the start; None: the start did not migrate.
    pub fn migrated(&self) -> Option<&Report> {
        self.migrated.as_ref()
    }

    /// Resolves when a newer server has migrated the database so that this one must no longer serve it.
    pub async fn outdated(&self) {
        self.outdated.notified().await;
    }

    /// Shuts down in order: reports unhealthy, stops claiming, ends streams with a reason, gives back the claims that
    /// no transport took, waits for calls to end. Calls that outlast the grace are cut.
    pub async fn shut_down(mut self) -> anyhow::Result<()> {
        let until = tokio::time::Instant::now() + self.grace;
        self.health.set(false).await;
        self.engine.dispatcher.shut_down(self.grace / 2).await;
        self.engine.waits.close();
        let _ = self.stop.send(());
        if tokio::time::timeout_at(until, &mut self.serving).await.is_err() {
            tracing::warn!("some calls did not end in time; cutting them off");
            self.serving.abort();
        }
        self.loops.shutdown().await;
        let leaving = self.engine.store.replica_leave(self.engine.hints.replica_id());
        if tokio::time::timeout(Duration::from_secs(2), leaving).await.is_err() {
            tracing::debug!("could not sign off at the database in time");
        }
        self.engine.store.close();
        Ok(())
    }
}

/// Refuses a database that is not migrated, whose clock is set by hand, or that fails [`connect::check`]. Returns the
/// origin of its schema and whether it has a doorbell.
async fn inspect(database: &Config) -> anyhow::Result<migrate::Known> {
    let client = connect::connect(database, "absurd serve").await?;
    let facts = connect::check(database, &client).await?;
    let known = migrate::inspect(&client).await?;
    let fake: Option<String> =
        client.query_one("select nullif(btrim(current_setting('absurd.fake_now', true)), '')", &[]).await?.get(0);
    anyhow::ensure!(fake.is_none(), "absurd.fake_now is set in this database: its clock does not tell the time");
    if let Some(problem) = facts.encoding_problem() {
        tracing::warn!("{problem}; see `absurd doctor`");
    }
    if facts.standby {
        tracing::warn!("database {:?} is a standby: nothing can be written until it is promoted", facts.database);
    }
    known.context("the database is not set up for this server; run `absurd migrate`, or add --migrate")
}

/// The upkeep interval: as asked; else hourly in databases of ours, never in adopted ones, which have a tool for
/// upkeep.
fn upkeep_every(asked: Option<Duration>, origin: Origin) -> Duration {
    asked.unwrap_or(match origin {
        Origin::Ours => UPKEEP_EVERY,
        Origin::Adopted => Duration::ZERO,
    })
}

fn start_loops(loops: &mut JoinSet<()>, engine: &Arc<Engine>, database: Config) {
    let parts = || Arc::clone(engine);
    loops.spawn(keep_up("hints", parts(), |parts| async move {
        doorbell::send(&parts.hints, &parts.store, &parts.looks).await;
    }));
    loops.spawn(keep_up("listening", (parts(), database), |(parts, database)| async move {
        doorbell::hear(&parts.hints, &parts.store, &database, &parts.dispatcher).await;
    }));
    loops.spawn(keep_up("tick", parts(), |parts| async move { maintenance::tick(&parts).await }));
    loops.spawn(keep_up("wide tick", parts(), |parts| async move { maintenance::wide_tick(&parts).await }));
    loops.spawn(keep_up("chores", parts(), |parts| async move { maintenance::chores(&parts).await }));
    loops.spawn(keep_up("waits", parts(), |parts| async move { parts.waits.run(&parts.store, &parts.looks).await }));
    loops.spawn(keep_up("awaited tasks", parts(), |parts| async move { awaited::look::run(&parts).await }));
}

/// Runs a background task forever. One that ends or panics is restarted after a second, so a panic does not stop the
/// replica.
async fn keep_up<T, F>(name: &'static str, parts: T, part: impl Fn(T) -> F)
where
    T: Clone,
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        // A `JoinSet`, so that aborting this task aborts the work too.
        let mut work = JoinSet::new();
        work.spawn(part(parts.clone()));
        if let Some(Err(error)) = work.join_next().await {
            metrics::part_ended(name);
            tracing::error!(part = name, %error, "a part of the server ended in a bug; it begins anew");
        }
        tokio::time::sleep(PART_PAUSE).await;
    }
}

/// Health follows the database's clock, which looks at queues read; when those are late, a statement of its own reads
/// it. Health ignores single queues: an unreadable or slow queue is no reason to restart a replica.
async fn watch_database(store: &Store, health: &Health, outdated: &Notify) {
    let mut healthy = true;
    // One read at a time, because each blocks while the database hangs.
    let mut reading = JoinSet::new();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        while reading.try_join_next().is_some() {}
        if reading.is_empty() && store.clock_age().is_none_or(|age| age >= CLOCK_LATE) {
            let store = store.clone();
            reading.spawn(async move { drop(store.clock().await) });
        }
        let old = store.min_server() > migrate::SERVER_GENERATION;
        if old {
            outdated.notify_one();
        }
        let now = !old && store.clock_age().is_some_and(|age| age < DATABASE_SILENCE);
        if now != healthy {
            healthy = now;
            let why = match (healthy, old) {
                (true, _) => "the database is back",
                (false, true) => "a newer server has migrated the database; this one must be upgraded",
                (false, false) => "the database does not answer",
            };
            tracing::warn!(healthy, "{why}");
            health.set(healthy).await;
        }
    }
}

/// The serving state that health checks and `/readyz` report.
#[derive(Debug, Clone)]
struct Health {
    reporter: HealthReporter,
    ready: Arc<AtomicBool>,
}

impl Health {
    async fn set(&self, serving: bool) {
        self.ready.store(serving, Ordering::Relaxed);
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", SERVICE] {
            self.reporter.set_service_status(service, status).await;
        }
    }
}

fn server(tls: Option<&(PathBuf, PathBuf)>, header_list_bytes_max: u32) -> anyhow::Result<Server> {
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_header_list_size(header_list_bytes_max)
        .max_concurrent_streams(20_000)
        // Bound on calls that clients reset before the server accepted them. h2's default of 20 cuts the connection
        // of a client whose calls time out together, with every claim stream on it. A flood reaches this bound within
        // milliseconds.
        .http2_max_pending_accept_reset_streams(Some(1000))
        // h2 budgets the overhead of small DATA frames at half of this window: a burst of tiny requests must not end a
        // connection.
        .initial_connection_window_size(gate::WINDOW_BYTES)
        .initial_stream_window_size(1024 * 1024);
    let Some((certificate, key)) = tls else { return Ok(server) };
    let read = |setting: &str, path: &PathBuf| {
        std::fs::read(path).with_context(|| format!("{setting}: cannot read {}", path.display()))
    };
    let identity = Identity::from_pem(read("tls-cert", certificate)?, read("tls-key", key)?);
    server.tls_config(ServerTlsConfig::new().identity(identity).timeout(Duration::from_secs(10))).with_context(|| {
        format!("tls-cert {} and tls-key {} make no certificate of a server", certificate.display(), key.display())
    })
}

/// The gRPC service. It has no encoding limit: the service bounds its own answers, and a client bounds the messages of
/// its claim streams.
fn service(engine: Arc<Engine>, limits: Limits) -> AbsurdServiceServer<Service> {
    AbsurdServiceServer::new(Service::new(engine, limits))
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(limits.request_bytes_max)
        .max_encoding_message_size(usize::MAX)
}

/// Lists only the services that are served, because clients call any service that reflection lists.
fn reflection<'a>(test_clock: bool) -> anyhow::Result<tonic_reflection::server::Builder<'a>> {
    let mut served = FileDescriptorSet::decode(absurd_proto::FILE_DESCRIPTOR_SET)?;
    served.file.retain(|file| test_clock || !file.name().ends_with("/test_clock.proto"));
    Ok(tonic_reflection::server::Builder::configure()
        .register_file_descriptor_set(served)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET))
}

/// Id of this process: host name, process id and 32 random bits.
fn replica_id() -> String {
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    format!("{host}:{}:{:x}", std::process::id(), uuid::Uuid::new_v4().as_fields().0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn adopted_databases_are_kept_up_only_where_somebody_asks_for_it() {
        assert!(upkeep_every(None, Origin::Adopted).is_zero());
        assert_eq!(upkeep_every(None, Origin::Ours), UPKEEP_EVERY);
        let minute = Duration::from_secs(60);
        for origin in [Origin::Ours, Origin::Adopted] {
            assert_eq!(upkeep_every(Some(minute), origin), minute);
        }
    }

    #[tokio::test]
    async fn a_part_that_ends_in_a_bug_begins_anew() {
        let begun = Arc::new(AtomicU32::new(0));
        let (tell, mut told) = tokio::sync::mpsc::channel(1);
        let parts = (Arc::clone(&begun), tell);
        let mut loops = JoinSet::new();
        loops.spawn(keep_up("test", parts, |(begun, tell)| async move {
            assert!(begun.fetch_add(1, Ordering::Relaxed) > 0, "a bug");
            let _ = tell.send(()).await;
            std::future::pending::<()>().await;
        }));
        told.recv().await;
        assert_eq!(begun.load(Ordering::Relaxed), 2);
    }
}
