//! The store: the only place that speaks SQL. Every call demands a [`Scope`] and runs named statements from `sql/queries`.

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

/// Longest wait for a lock where a transaction says nothing else. Statements pass over rows that somebody holds, so this is the
/// time that a connection is lost to a locked table before that is known.
pub(crate) const LOCK_WAIT: Duration = Duration::from_millis(200);
/// The same for upkeep: a queue is dropped, a partition made.
const LOCK_WAIT_UPKEEP: Duration = Duration::from_secs(5);
/// Longest wait of one try of a transaction that waits for held rows.
pub(crate) const LOCK_WAIT_PATIENT: Duration = Duration::from_secs(1);
/// Prepared statements kept per connection; beyond it the connection's cache starts anew.
const STATEMENTS_MAX: usize = 256;
/// Between two tries of a read that meets locks.
const LOCKED_PAUSE: Duration = Duration::from_millis(20);
/// Ids may run ahead of the time by this much, in 1/4096 ms; beyond it the clock was set back.
const IDS_AHEAD_MAX: u64 = 1000 << 12;
/// Longest time for a look at which tables exist.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// A queue that is refused for a lasting reason is named in the log this often.
const LASTING_EVERY: Duration = Duration::from_secs(60);
/// Rendered texts kept per replica.
const TEXTS_MAX: usize = 8192;

/// How the store connects.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Parsed URL; its password is never printed.
    pub database: tokio_postgres::Config,
    /// Connections at most.
    pub connections_max: usize,
    /// Longest wait for a free connection.
    pub wait_max: Duration,
    /// Whether the time can be set, for tests.
    pub test_clock: bool,
}

/// Access to one database.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// Name of a statement, its variant, and the queue that it is rendered for.
type TextKey = (&'static str, Wait, String);

#[derive(Debug)]
struct Inner {
    pools: Pools,
    /// At the connections for what callers read.
    reads: Turns,
    options: StoreOptions,
    texts: Mutex<HashMap<TextKey, Arc<str>>>,
    /// A reading of the database's clock, and when it was taken.
    clock: Mutex<Option<(Monotonic, i64)>>,
    /// Time and place of the newest minted id.
    last_id: AtomicU64,
    /// The oldest generation of servers that may run on this database.
    min_server: AtomicI32,
    /// Only with `--test-clock`.
    test_clock: Option<clock::TestClock>,
    failing: Failing,
    /// When the log last named a queue, or the database, for a fault of a kind that lasts.
    lasting: Mutex<HashMap<(&'static str, String), Monotonic>>,
    locked: LockedQueues,
    /// At the connections for transactions that wait for held rows: the others never do.
    patient: Arc<Semaphore>,
}

/// Settings of our sessions: the doorbell's trigger stays silent for them, plans are made once per statement, and walk an
/// index even where the queue was empty when they were made; no setting of the database or the role gives them another time.
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
    // A peer that acknowledges nothing is gone after ten seconds, whether we wait for an answer or for room to send.
    config.keepalives_idle(Duration::from_secs(4)).keepalives_interval(Duration::from_secs(2)).keepalives_retries(3);
    config.tcp_user_timeout(Duration::from_secs(10));
    config
}

impl Store {
    /// A store whose connections are opened when they are first needed.
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

    /// How the store connects.
    pub fn options(&self) -> &StoreOptions {
        &self.inner.options
    }

    /// Closes all connections.
    pub fn close(&self) {
        self.inner.pools.close();
    }

    /// What fails on purpose, for tests.
    pub fn failing(&self) -> &Failing {
        &self.inner.failing
    }

    /// By role: connections at most, open, and callers that wait for one.
    pub fn connections(&self) -> Vec<(&'static str, usize, usize, usize)> {
        self.inner.pools.state()
    }

    /// What is held of the store: connections, turns at them, and permits to wait for held rows.
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

    /// Runs a statement on a connection of its own, in a transaction of its own. Where the queue's tables are locked, a read
    /// waits until they are not, as long as its caller does; any other statement fails at once.
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
        // The caller may go away while the statement runs.
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
            metrics::fault(fault);
            self.note_lasting(statement, scope, fault);
            if fault.is_of_connection() {
                drop(Object::take(client));
            }
        }
        done
    }

    /// Runs a statement in a transaction of its own, which waits for locks at most this long.
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

    /// Begins a transaction whose statements wait for locks at most this long. Transactions that wait longer than [`LOCK_WAIT`]
    /// take half of the connections at most, so that held rows never keep others from theirs.
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

    /// Remembers which server may run on this database.
    pub(crate) fn note_min_server(&self, generation: i32) {
        self.inner.min_server.store(generation, Ordering::Relaxed);
    }

    /// The oldest generation of servers that may run on this database, as of the last look.
    pub fn min_server(&self) -> i32 {
        self.inner.min_server.load(Ordering::Relaxed)
    }

    /// Names in the log, now and then, a queue that an operator has to mend.
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

    /// Remembers a reading of the database's clock.
    pub(crate) fn note_clock(&self, micros: i64) {
        let mut clock = self.inner.clock.lock().unwrap_or_else(PoisonError::into_inner);
        *clock = Some((Monotonic::now(), micros));
    }

    /// The database's time, reckoned from the last reading.
    pub fn now(&self) -> Option<Instant> {
        if let Some(set) = self.test_time() {
            return Some(set);
        }
        let clock = self.inner.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.map(|(read_at, micros)| Instant::from_micros(micros).plus(read_at.elapsed()))
    }

    /// How long ago the database's clock was read.
    pub fn clock_age(&self) -> Option<Duration> {
        let clock = self.inner.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.map(|(read_at, _)| read_at.elapsed())
    }

    /// A new `UUIDv7` by the database's time, later than those before it: runs of one call are claimed in its order.
    pub fn mint_id(&self) -> Uuid {
        let micros = self.now().map_or(0, Instant::micros).max(0).unsigned_abs();
        let mut bytes = [0_u8; 10];
        if getrandom::fill(&mut bytes).is_err() {
            return Uuid::new_v4();
        }
        // Twelve bits below the millisecond, a step at least from one id to the next (RFC 9562, 6.2, method 3).
        let now = ((micros / 1000) << 12) | ((micros % 1000) * 4096 / 1000);
        let step = |last: u64| Some(if last < now || last - now > IDS_AHEAD_MAX { now } else { last + 1 });
        let last = self.inner.last_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).unwrap_or(now);
        let place = step(last).unwrap_or(now);
        bytes[..2].copy_from_slice(&place.to_be_bytes()[6..]);
        uuid::Builder::from_unix_timestamp_millis(place >> 12, &bytes).into_uuid()
    }
}

/// Transactions that wait for held rows at the same time, at most: half of the connections.
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

/// A fault that may come from a table, a function or a schema that is not there, by what is: the queue does not exist, or
/// is damaged, or the schemas are gone.
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

/// Runs a statement; one that is not answered in time leaves its outcome unknown, and its connection is of no more use.
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

/// An open transaction. Dropped without [`Tx::commit`] it is rolled back, whatever still runs in it is cancelled, and then its
/// connection goes back to the pool.
#[derive(Debug)]
pub(crate) struct Tx {
    client: Option<Object>,
    store: Store,
    /// Longest time until an answer.
    limit: Duration,
    /// Whether the connection is, and the transaction with it.
    lost: AtomicBool,
    /// Whether it was rolled back to find out what a fault meant.
    over: AtomicBool,
    patience: Option<OwnedSemaphorePermit>,
}

impl Tx {
    /// Runs a statement in the transaction.
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
                    // The transaction is void, and says nothing more; outside of it the database does.
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

    /// A fault before the commit: whatever was done goes with the transaction, so nothing is in doubt.
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

    /// Commits; the connection goes back to the pool.
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

    /// Rolls back; the connection goes back to the pool, unless it is lost.
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

    /// A store that has nobody to connect to.
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
