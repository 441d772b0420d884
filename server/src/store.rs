//! The store: all access to Postgres while the server serves.
//!
//! Every [`Statement`] is a file in `sql/queries`. Only session control, migrations and connection checks carry SQL
//! text of their own. A method that acts on one queue for a caller takes a [`Scope`].

pub mod batch;
pub mod checkpoint;
pub mod clock;
pub mod connect;
pub mod event;
pub mod failing;
pub mod fault;
pub mod listen;
mod locked;
pub mod migrate;
pub mod policy;
pub mod pool;
pub mod quarantine;
pub mod queue;
pub mod run;
mod sqlstate;
pub mod statement;
pub mod suspend;
pub mod task;
pub mod text;
pub mod tick;
pub mod turns;
pub mod upkeep;
pub mod workflow;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant as Monotonic};

use deadpool_postgres::Object;
use postgres_types::ToSql;
use scopeguard::{ScopeGuard, guard};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::domain::{Error, Instant};
use crate::metrics;
use crate::scope::Scope;
use failing::{Failing, Fate};
pub use fault::Fault;
pub(crate) use locked::Access;
use locked::LockedQueues;
use pool::{Pools, Role};
use statement::SCHEMA_GET;
pub use statement::{Statement, Wait};
use turns::Turns;

/// Lock timeout of pooled sessions, except those of [`Role::Upkeep`]. Most statements skip locked rows, so this bounds
/// how long a locked table holds a connection.
pub(crate) const LOCK_WAIT: Duration = Duration::from_millis(200);
/// Lock timeout of sessions of [`Role::Upkeep`]: dropping a queue waits for other users of its tables.
const LOCK_WAIT_UPKEEP: Duration = Duration::from_secs(5);
/// Longest lock wait of one attempt of a transaction that waits for locked rows.
pub(crate) const LOCK_WAIT_PATIENT: Duration = Duration::from_secs(1);
/// Prepared statements kept per connection. Beyond this number the connection's statement cache is cleared.
const STATEMENTS_MAX: usize = 256;
/// Pause between two attempts of a read whose queue is locked.
const LOCKED_PAUSE: Duration = Duration::from_millis(20);
/// Upper bound on how far minted ids may run ahead of the clock, in 1/4096 ms. A larger lead means that the clock was
/// set back.
const IDS_AHEAD_MAX: u64 = 1000 << 12;
/// Time limit of the query for the tables that exist.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// Shortest time between two log lines about lasting faults of the same kind and queue.
const LASTING_EVERY: Duration = Duration::from_secs(60);
/// Rendered statement texts kept per replica. At this number the cache is cleared.
const TEXTS_MAX: usize = 8192;

/// Connection settings of a [`Store`].
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Parsed database URL. Its `Debug` form never contains the password.
    pub database: tokio_postgres::Config,
    /// Upper bound of pooled connections, over all roles.
    pub connections_max: usize,
    /// Longest wait for a free connection.
    pub wait_max: Duration,
    /// Whether tests may set the time (`--test-clock`).
    pub test_clock: bool,
}

/// Access to one database. Clones share connections and caches.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// Name of a statement, its lock variant, and the queue of the rendered text. The queue is empty for texts that do not
/// depend on it.
type TextKey = (&'static str, Wait, String);

#[derive(Debug)]
struct Inner {
    pools: Pools,
    /// Turns at the connections of [`Role::Read`].
    reads: Turns,
    options: StoreOptions,
    texts: Mutex<HashMap<TextKey, Arc<str>>>,
    /// Local time of the newest reading of the database's clock, and that reading in microseconds since 1970.
    clock: Mutex<Option<(Monotonic, i64)>>,
    /// Time of the newest minted id: milliseconds since 1970 in the upper bits, 12 bits of fraction below.
    last_id: AtomicU64,
    /// Oldest generation of servers that may run on this database.
    min_server: AtomicI32,
    /// Present only with `--test-clock`.
    test_clock: Option<clock::TestClock>,
    failing: Failing,
    /// When the log last named a fault that lasts, by kind and queue. The queue is empty for faults of the database.
    lasting: Mutex<HashMap<(&'static str, String), Monotonic>>,
    locked: LockedQueues,
    /// Permits for transactions that wait for locked rows. They leave the other connections to work that never waits
    /// for rows.
    patient: Arc<Semaphore>,
}

/// Session settings of the server's connections. They silence the doorbell trigger. Plans are generic, made once per
/// statement, and use indexes even if the queue was empty at that time. Time zone, isolation level and clock are fixed,
/// and override the settings of the database and the role.
pub(crate) fn session_config(
    database: &tokio_postgres::Config,
    name: &str,
    statement_timeout: Duration,
    lock_wait: Duration,
) -> tokio_postgres::Config {
    let mut config = database.clone();
    let options = config.get_options().unwrap_or_default().to_owned();
    config.options(format!(
        "{options} -c absurd_server.writer=on -c absurd.fake_now= -c jit=off -c plan_cache_mode=force_generic_plan \
         -c enable_seqscan=off -c enable_bitmapscan=off \
         -c statement_timeout={}ms -c lock_timeout={}ms -c idle_in_transaction_session_timeout=5s -c TimeZone=UTC \
         -c default_transaction_isolation=read\\ committed -c standard_conforming_strings=on",
        statement_timeout.as_millis(),
        lock_wait.as_millis()
    ));
    config.application_name(name);
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(Duration::from_secs(5));
    }
    // A peer that acknowledges nothing for ten seconds is dropped, both while we wait for an answer and while we send.
    config.keepalives_idle(Duration::from_secs(4)).keepalives_interval(Duration::from_secs(2)).keepalives_retries(3);
    config.tcp_user_timeout(Duration::from_secs(10));
    config
}

impl Store {
    /// Creates a store. It opens a connection only when a statement needs one.
    pub fn new(options: StoreOptions) -> Result<Self, Error> {
        Ok(Self {
            inner: Arc::new(Inner {
                failing: Failing::default(),
                lasting: Mutex::new(HashMap::new()),
                locked: LockedQueues::default(),
                patient: Arc::new(Semaphore::new(patient_max(&options))),
                pools: Pools::new(&options)?,
                reads: Turns::new(pool::connections(Role::Read, options.connections_max)),
                test_clock: options.test_clock.then(clock::TestClock::default),
                options,
                texts: Mutex::new(HashMap::new()),
                clock: Mutex::new(None),
                last_id: AtomicU64::new(0),
                min_server: AtomicI32::new(0),
            }),
        })
    }

    /// The options that the store was created with.
    pub fn options(&self) -> &StoreOptions {
        &self.inner.options
    }

    /// Closes the pools. Later calls fail.
    pub fn close(&self) {
        self.inner.pools.close();
    }

    /// Failure injection, for tests.
    pub fn failing(&self) -> &Failing {
        &self.inner.failing
    }

    /// Per role: upper bound of connections, open connections, and callers waiting for one.
    pub fn connections(&self) -> Vec<(&'static str, usize, usize, usize)> {
        self.inner.pools.state()
    }

    /// Connections in use, read turns held or awaited, and permits held to wait for locked rows. Zero when nothing
    /// runs.
    pub fn held(&self) -> usize {
        let patient = patient_max(&self.inner.options) - self.inner.patient.available_permits();
        self.inner.pools.in_use() + self.inner.reads.held() + patient
    }

    pub(crate) async fn client(&self, role: Role) -> Result<Object, Fault> {
        let client = self.inner.pools.get(role).await?;
        if client.statement_cache.size() > STATEMENTS_MAX {
            client.statement_cache.clear();
        }
        if let Some(clock) = &self.inner.test_clock {
            self.apply(clock, &client).await?;
        }
        Ok(client)
    }

    fn text(&self, statement: &Statement, wait: Wait, scope: Option<&Scope>) -> Arc<str> {
        let queue = scope.filter(|_| statement.per_queue).map_or("", |scope| scope.queue().as_str());
        let key = (statement.name, wait, queue.to_owned());
        let mut texts = self.inner.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = texts.get(&key) {
            return Arc::clone(text);
        }
        if texts.len() >= TEXTS_MAX {
            texts.clear();
        }
        let text: Arc<str> = statement.render(queue, wait).into();
        texts.insert(key, Arc::clone(&text));
        text
    }

    /// Runs a statement on a pooled connection, in a transaction of its own. While the tables of the queue are known to
    /// be locked, a read waits, for as long as its caller does. A work or lease statement fails at once with
    /// [`Fault::Locked`]. An upkeep statement is sent anyway and waits for the lock at most [`LOCK_WAIT_UPKEEP`].
    pub(crate) async fn rows(
        &self,
        statement: &Statement,
        wait: Wait,
        scope: Option<&Scope>,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        let Some(queue) = scope.map(|scope| scope.queue().as_str()) else {
            return self.rows_now(statement, wait, scope, params).await;
        };
        match statement.role() {
            Role::Read => loop {
                self.wait_for(queue, Access::Reads).await;
                match self.rows_now(statement, wait, scope, params).await {
                    Err(Fault::Locked) => {
                        self.suspect(queue).await;
                        tokio::time::sleep(LOCKED_PAUSE).await;
                    }
                    done => return done,
                }
            },
            Role::Upkeep => self.rows_now(statement, wait, scope, params).await,
            Role::Work | Role::Lease => {
                self.admit(queue)?;
                let done = self.rows_now(statement, wait, scope, params).await;
                if matches!(done, Err(Fault::Locked)) {
                    self.suspect(queue).await;
                }
                done
            }
        }
    }

    fn admit(&self, queue: &str) -> Result<(), Fault> {
        if self.is_locked(queue) { Err(Fault::Locked) } else { Ok(()) }
    }

    async fn rows_now(
        &self,
        statement: &Statement,
        wait: Wait,
        scope: Option<&Scope>,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        let role = statement.role();
        let turn = match role {
            Role::Read => {
                let turn = self.inner.reads.take(1, self.inner.options.wait_max).await;
                Some(turn.map_err(|after| Fault::Busy { after })?)
            }
            Role::Work | Role::Lease | Role::Upkeep => None,
        };
        let client = self.client(role).await?;
        let fate = self.inner.failing.fate(statement.name).await;
        if fate == Fate::FailsBefore {
            return Err(on_purpose(fate));
        }
        // The caller may drop this future while the statement runs.
        let using = guard((client, turn), |(client, turn)| pool::take_back(client, "", turn));
        let client = &using.0;
        let text = self.text(statement, wait, scope);
        let limit = role.silence_max();
        let mut done = query(client, &text, params, limit).await;
        if matches!(done, Err(Fault::StalePlan)) {
            client.statement_cache.clear();
            done = query(client, &text, params, limit).await;
        }
        if let Err(fault) = done {
            done = Err(named(client, scope, fault).await);
        }
        let (client, _turn) = ScopeGuard::into_inner(using);
        if fate == Fate::FailsAfter {
            done = Err(on_purpose(fate));
        }
        if let Err(fault) = &done {
            metrics::fault(fault.kind());
            self.note_lasting(statement, scope, fault);
            if fault.is_of_connection() {
                drop(Object::take(client));
            }
        }
        done
    }

    /// Runs a statement in a transaction of its own that waits for locks at most `lock_wait`.
    pub(crate) async fn rows_within(
        &self,
        lock_wait: Duration,
        statement: &Statement,
        wait: Wait,
        scope: Option<&Scope>,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        let tx = self.begin(lock_wait).await?;
        match tx.rows(statement, wait, scope, params).await {
            Ok(rows) => {
                tx.commit().await?;
                Ok(rows)
            }
            Err(fault) => {
                tx.rollback().await;
                Err(fault)
            }
        }
    }

    /// Begins a transaction whose statements wait for locks at most `lock_wait`. Transactions with a wait above
    /// [`LOCK_WAIT`] use at most half of the work connections, so locked rows cannot exhaust the pool.
    pub(crate) async fn begin(&self, lock_wait: Duration) -> Result<Tx, Fault> {
        let patience = match lock_wait > LOCK_WAIT {
            true => Arc::clone(&self.inner.patient).acquire_owned().await.ok(),
            false => None,
        };
        let client = self.client(Role::Work).await?;
        if self.inner.failing.fate("begin").await != Fate::Lives {
            return Err(on_purpose(Fate::FailsBefore));
        }
        let lock_ms = lock_wait.as_millis().clamp(1, 60_000);
        let limit = lock_wait + Role::Work.statement_timeout();
        let begin = format!(
            "begin; set local lock_timeout = {lock_ms}; set local statement_timeout = {}",
            limit.as_millis().min(90_000)
        );
        let lost = AtomicBool::new(false);
        let tx = Tx {
            client: Some(client),
            store: self.clone(),
            limit: limit + pool::SILENCE,
            lost,
            over: AtomicBool::new(false),
            patience,
        };
        tx.say(&begin).await.map_err(|fault| tx.undone(fault))?;
        Ok(tx)
    }

    /// Stores the generation that the newest tick has read.
    pub(crate) fn note_min_server(&self, generation: i32) {
        self.inner.min_server.store(generation, Ordering::Relaxed);
    }

    /// Oldest generation of servers that may run on this database, as of the newest tick; 0 before the first.
    pub fn min_server(&self) -> i32 {
        self.inner.min_server.load(Ordering::Relaxed)
    }

    /// Logs a fault that an operator has to repair, at most once per [`LASTING_EVERY`] for each kind and queue.
    fn note_lasting(&self, statement: &Statement, scope: Option<&Scope>, fault: &Fault) {
        if !fault.is_lasting() {
            return;
        }
        let queue = scope.map_or("", |scope| scope.queue().as_str());
        let now = Monotonic::now();
        let mut told = self.inner.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| now.duration_since(*at) < LASTING_EVERY);
        let mut is_new = false;
        told.entry((fault.kind(), queue.to_owned())).or_insert_with(|| {
            is_new = true;
            now
        });
        drop(told);
        if is_new {
            tracing::warn!(
                queue.name = queue,
                statement = statement.name,
                kind = fault.kind(),
                "{fault}; see `absurd doctor`"
            );
        }
    }

    /// Stores a reading of the database's clock, in microseconds since 1970.
    pub(crate) fn note_clock(&self, micros: i64) {
        let mut clock = self.inner.clock.lock().unwrap_or_else(PoisonError::into_inner);
        *clock = Some((Monotonic::now(), micros));
    }

    /// The database's time, extrapolated from the newest reading of its clock. A time set by a test wins. `None` before
    /// the first reading.
    pub fn now(&self) -> Option<Instant> {
        if let Some(set) = self.test_time() {
            return Some(set);
        }
        let clock = self.inner.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.map(|(read_at, micros)| Instant::from_micros(micros).plus(read_at.elapsed()))
    }

    /// Age of the newest reading of the database's clock. `None` before the first reading.
    pub fn clock_age(&self) -> Option<Duration> {
        let clock = self.inner.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.map(|(read_at, _)| read_at.elapsed())
    }

    /// Mints a UUIDv7 from the database's time, greater than the ids minted before. Runs of one call share their time,
    /// so they are claimed in the order of their ids.
    pub fn mint_id(&self) -> Uuid {
        let micros = self.now().map_or(0, Instant::micros).max(0).unsigned_abs();
        let mut bytes = [0_u8; 10];
        if getrandom::fill(&mut bytes).is_err() {
            return Uuid::new_v4();
        }
        // 12 bits of sub-millisecond time, and at least one step between two ids (RFC 9562, section 6.2, method 3).
        let now = ((micros / 1000) << 12) | ((micros % 1000) * 4096 / 1000);
        let step = |last: u64| Some(if last < now || last - now > IDS_AHEAD_MAX { now } else { last + 1 });
        let last = self.inner.last_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).unwrap_or(now);
        let place = step(last).unwrap_or(now);
        bytes[..2].copy_from_slice(&place.to_be_bytes()[6..]);
        uuid::Builder::from_unix_timestamp_millis(place >> 12, &bytes).into_uuid()
    }
}

/// Transactions that may wait for locked rows at the same time: half of the work connections, at least one.
fn patient_max(options: &StoreOptions) -> usize {
    (pool::connections(Role::Work, options.connections_max) / 2).max(1)
}

fn on_purpose(fate: Fate) -> Fault {
    match fate {
        Fate::FailsAfter => Fault::Unknown("failed on purpose, after it was carried out".into()),
        Fate::Lives | Fate::FailsBefore | Fate::Hangs => {
            Fault::Gone("failed on purpose, before it was carried out".into())
        }
    }
}

/// Refines a fault about a missing table, function or schema by the tables that exist. It becomes a missing queue, a
/// damaged queue or a missing schema.
async fn named(client: &Object, scope: Option<&Scope>, fault: Fault) -> Fault {
    let (Fault::NoTable(text) | Fault::Damaged(text)) = &fault else { return fault };
    let queue = scope.map(|scope| scope.queue().as_str());
    let looked = query(client, &SCHEMA_GET.render("", Wait::Skip), &[&queue], LOOK_MAX).await;
    let Some(row) = looked.ok().and_then(|rows| rows.into_iter().next()) else { return fault };
    let tables: i32 = row.get("tables");
    match (row.get("contract"), row.get("side")) {
        (false, _) => Fault::Schema("schema absurd is gone from the database".into()),
        (_, false) => Fault::Schema("schema absurd_server is gone from the database".into()),
        _ if matches!(fault, Fault::Damaged(_)) => fault,
        _ if tables == 0 => Fault::Missing,
        _ => Fault::Damaged(text.clone()),
    }
}

/// Runs a statement. Without an answer within `limit` the outcome is unknown, and the connection must be discarded.
async fn query(
    client: &Object,
    text: &str,
    params: &[&(dyn ToSql + Sync)],
    limit: Duration,
) -> Result<Vec<Row>, Fault> {
    let running = async {
        let prepared = client.prepare_cached(text).await?;
        client.query(&prepared, params).await
    };
    in_time(limit, running).await
}

async fn in_time<T>(
    limit: Duration,
    running: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, Fault> {
    match tokio::time::timeout(limit, running).await {
        Ok(done) => done.map_err(|error| Fault::from_postgres(&error)),
        Err(_) => Err(Fault::Unknown(format!("Postgres gave no answer within {limit:?}"))),
    }
}

/// An open transaction. Dropped without [`Tx::commit`], it is rolled back. A statement that still runs is cancelled
/// first, and then the connection returns to the pool.
#[derive(Debug)]
pub(crate) struct Tx {
    client: Option<Object>,
    store: Store,
    /// Longest wait for the answer to one statement.
    limit: Duration,
    /// Whether the connection is lost, and the transaction with it.
    lost: AtomicBool,
    /// Whether the transaction was rolled back early, to find out why a table was missing.
    over: AtomicBool,
    patience: Option<OwnedSemaphorePermit>,
}

impl Tx {
    /// Runs a statement in the transaction. Fails with [`Fault::Locked`] if the queue is known to be locked.
    pub(crate) async fn rows(
        &self,
        statement: &Statement,
        wait: Wait,
        scope: Option<&Scope>,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        let ended = || Fault::Gone("transaction ended".into());
        let client = self.client.as_ref().filter(|_| !self.over.load(Ordering::Relaxed)).ok_or_else(ended)?;
        if let Some(scope) = scope {
            self.store.admit(scope.queue().as_str())?;
        }
        let text = self.store.text(statement, wait, scope);
        let done = match self.store.inner.failing.fate(statement.name).await {
            Fate::Lives => match query(client, &text, params, self.limit).await {
                Err(fault @ (Fault::NoTable(_) | Fault::Damaged(_))) => {
                    // Postgres accepts no further statement in a failed transaction, so `named` needs this rollback
                    // first.
                    self.over.store(true, Ordering::Relaxed);
                    self.say("rollback").await.map_err(|fault| self.undone(fault))?;
                    Err(named(client, scope, fault).await)
                }
                done => done.map_err(|fault| self.undone(fault)),
            },
            fate => Err(self.undone(on_purpose(fate))),
        };
        if let (Err(Fault::Locked), Some(scope)) = (&done, scope) {
            self.store.suspect(scope.queue().as_str()).await;
        }
        if let Err(fault) = &done {
            self.store.note_lasting(statement, scope, fault);
        }
        done
    }

    /// Maps a fault before the commit. The transaction is rolled back, so an unknown outcome becomes [`Fault::Gone`].
    fn undone(&self, fault: Fault) -> Fault {
        self.lost.fetch_or(fault.is_of_connection(), Ordering::Relaxed);
        match (fault, &self.client) {
            (Fault::Unknown(text), _) => Fault::Gone(text),
            (Fault::StalePlan, Some(client)) => {
                client.statement_cache.clear();
                Fault::StalePlan
            }
            (fault, _) => fault,
        }
    }

    async fn say(&self, text: &str) -> Result<(), Fault> {
        let Some(client) = &self.client else { return Err(Fault::Gone("transaction ended".into())) };
        in_time(self.limit, client.batch_execute(text)).await
    }

    /// Commits, and returns the connection to the pool.
    pub(crate) async fn commit(mut self) -> Result<(), Fault> {
        let fate = self.store.inner.failing.fate("commit").await;
        if fate == Fate::FailsBefore {
            return Err(on_purpose(Fate::FailsAfter));
        }
        if self.over.load(Ordering::Relaxed) {
            return Err(Fault::Gone("transaction ended".into()));
        }
        self.say("commit").await?;
        if fate == Fate::FailsAfter {
            return Err(on_purpose(fate));
        }
        drop(self.client.take());
        Ok(())
    }

    /// Rolls back, and returns the connection to the pool unless it is lost.
    pub(crate) async fn rollback(mut self) {
        let lost = self.lost.load(Ordering::Relaxed);
        if !lost && (self.over.load(Ordering::Relaxed) || self.say("rollback").await.is_ok()) {
            drop(self.client.take());
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        let Some(client) = self.client.take() else { return };
        if *self.lost.get_mut() {
            drop(Object::take(client));
        } else {
            pool::take_back(client, "rollback", self.patience.take());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A store whose database cannot be reached.
    pub(crate) fn nowhere() -> Store {
        let database = "postgresql://nobody@127.0.0.1:1/none".parse().unwrap();
        let wait_max = Duration::from_secs(1);
        Store::new(StoreOptions { database, connections_max: 2, wait_max, test_clock: false }).unwrap()
    }

    #[tokio::test]
    async fn ids_that_are_minted_in_one_moment_are_in_order() {
        let store = nowhere();
        let ids: Vec<Uuid> = (0..10_000).map(|_| store.mint_id()).collect();
        assert!(ids.is_sorted_by(|before, after| before < after));
    }
}
