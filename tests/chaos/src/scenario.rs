//! The faults, one scenario each, as design numbers them; each runs beside a load until its time is over.

use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::crowd;
use crate::ledger::Finding;
use crate::world::{Size, World};
use absurd_tests::Toxic;

/// What a scenario does until a time.
type Act = for<'a> fn(&'a mut World, Instant) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + 'a>>;

/// One scenario.
pub(crate) struct Scenario {
    pub id: &'static str,
    pub what: &'static str,
    /// What differs from the usual world.
    pub size: fn(&mut Size),
    pub act: Act,
    /// What must have happened, or the run says nothing: a figure of the checker, and how much of it.
    pub evidence: &'static [(&'static str, i64)],
    /// Leases may end early: the clock is moved.
    pub moves_clock: bool,
    /// Part of the random schedule.
    pub at_random: bool,
}

macro_rules! scenario {
    ($id:literal, $what:literal, $act:ident $(, size: $size:expr)? $(, evidence: $evidence:expr)? $(, clock: $clock:expr)? $(, random: $random:expr)?) => {
        Scenario {
            id: $id,
            what: $what,
            act: |world, until| Box::pin($act(world, until)),
            size: { #[allow(unused_mut, unused_assignments, reason = "a default")] let mut size: fn(&mut Size) = |_| {}; $(size = $size;)? size },
            evidence: { #[allow(unused_mut, unused_assignments, reason = "a default")] let mut evidence: &[(&str, i64)] = &[]; $(evidence = $evidence;)? evidence },
            moves_clock: { #[allow(unused_mut, unused_assignments, reason = "a default")] let mut clock = false; $(clock = $clock;)? clock },
            at_random: { #[allow(unused_mut, unused_assignments, reason = "a default")] let mut random = true; $(random = $random;)? random },
        }
    };
}

/// All scenarios.
pub(crate) fn all() -> Vec<Scenario> {
    vec![
        scenario!("F0", "no fault at all", nothing),
        scenario!("F1", "SIGKILL of a replica, again and again", kill_replicas),
        scenario!("F2", "SIGKILL of all replicas, and nobody there for a while", kill_all_replicas, evidence: &[("leases that ran out", 1)]),
        scenario!("F3", "SIGKILL of workers in the middle of steps", kill_workers, evidence: &[("leases that ran out", 1)]),
        scenario!("F4", "SIGSTOP of workers for two leases: they come back late", stop_workers, size: short_lease, evidence: &[("late writes refused", 1)]),
        scenario!("F5", "SIGSTOP of a replica past heartbeats and leases", stop_replicas, size: short_lease),
        scenario!("F6", "SIGKILL of one session of Postgres: all sessions are reset", kill_backend),
        scenario!("F7", "SIGKILL of the postmaster, crash recovery", kill_postgres),
        scenario!("F8", "Postgres stopped for up to 2 s, again and again", stop_postgres),
        scenario!("F9", "answers of Postgres lost after the commit", swallow),
        scenario!("F10", "a black hole between a replica and Postgres", hole_database),
        scenario!("F11", "links of workers: black holes one way or both, slow, late, reset", hole_workers),
        scenario!("F11b", "links of workers are reset while they work for long", reset_workers, size: |size| size.work = 1000),
        scenario!("F12", "half-open connections: the worker's end hears nothing of the close", half_open),
        scenario!("F13", "Postgres killed for good; a standby that commits waited for takes over", fail_over, evidence: &[("failovers", 1)], random: false),
        scenario!("F14", "Postgres stands still for seconds", freeze_postgres),
        scenario!("F14b", "the disk of Postgres is full for seconds", fill_disk, size: small_disk, evidence: &[("refused for want of room", 1)], random: false),
        scenario!("F15", "the database's clock jumps: an hour, a month, backwards", jump_clock, clock: true, random: false),
        scenario!("F16", "10,000 idle streams on one replica, which dies", storm, evidence: &[("streams that came back", 10_000)], random: false),
        scenario!("F17", "500 callers of replicas with four connections each, and none left in Postgres", crowd_out, size: long_work_on_four_connections, evidence: &[("answers for the crowd", 500)], random: false),
        scenario!("F18", "another session holds rows of running tasks, and of all tasks", hold_rows),
        scenario!("F19", "a snapshot is pinned all the while", pin_snapshot, random: false),
        scenario!("F20", "Postgres gives out no transaction ids until it is vacuumed", use_up_ids, size: |size| size.settings.push("autovacuum_naptime=1s".into()), evidence: &[("writes refused for want of ids", 1), ("of these to replicas", 1)], random: false),
        scenario!("F21", "runs that nobody can fail beside others whose lease runs out", poison, size: short_lease, evidence: &[("leases that ran out", 1)], random: false),
        scenario!("F22", "floods of pings, settings, resets and continuations", flood, evidence: &[("floods ended", 12)], random: false),
        scenario!("F23", "workers that ask for tasks and read nothing", read_nothing, size: short_stall, evidence: &[("silent workers cut", 3), ("claims given back", 20)], random: false),
        scenario!("F24", "replicas restarted by SIGTERM in turn", roll, evidence: &[("restarts", 2)]),
        scenario!("F26", "the listening session killed; malformed notifications", kill_listener),
        scenario!("F27", "cleanup of events beside emissions and waits", clean_events, random: false),
        scenario!("F28", "Postgres down for a long while", long_stop, random: false),
        scenario!("F30", "links stop one by one and heal in another order", swizzle),
        scenario!("F31", "a replica short of file descriptors", starve_descriptors, size: |size| size.work = 200, random: false),
    ]
}

fn short_lease(size: &mut Size) {
    size.lease = 4;
    size.flags.extend(["--heartbeat".into(), "1s".into()]);
}

fn short_stall(size: &mut Size) {
    let stall = format!("{}s", crowd::STALL_MAX.as_secs());
    size.flags.extend(["--max-stall".into(), stall, "--heartbeat".into(), "1s".into()]);
}

fn long_work_on_four_connections(size: &mut Size) {
    size.connections = 4;
    size.work = 200;
}

async fn pause(range: Range<u64>, world: &mut World, until: Instant) {
    let ms = world.random.u64(range);
    tokio::time::sleep_until(until.min(Instant::now() + Duration::from_millis(ms))).await;
}

fn over(until: Instant) -> bool {
    Instant::now() >= until
}

async fn nothing(_: &mut World, until: Instant) -> anyhow::Result<()> {
    tokio::time::sleep_until(until).await;
    Ok(())
}

async fn kill_replicas(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(2000..5000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let replica = world.random.usize(0..world.replicas.len());
        world.deed(format!("SIGKILL replica {replica}")).await;
        world.replicas[replica].kill().await;
        pause(100..1500, world, until).await;
        world.start_replica(replica).await?;
    }
}

async fn kill_all_replicas(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(3000..6000, world, until).await;
        if over(until) {
            return Ok(());
        }
        world.deed("SIGKILL of all replicas").await;
        world.went_down();
        for replica in &mut world.replicas {
            replica.kill().await;
        }
        pause(8000..12_000, world, until).await;
        for replica in 0..world.replicas.len() {
            world.start_replica(replica).await?;
        }
    }
}

async fn kill_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(500..2000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let worker = world.random.usize(0..world.workers.len());
        world.deed(format!("SIGKILL worker {worker}")).await;
        world.workers[worker].kill().await;
        world.start_worker(worker)?;
    }
}

async fn stop_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let lease = world.size.lease * 1000;
    loop {
        pause(500..1500, world, until).await;
        if over(until) {
            return Ok(());
        }
        // Python's worker is always among them: it asks whatever it has been told meanwhile.
        let count = world.workers.len();
        let mut stopped = vec![0];
        stopped.extend((0..count / 3).map(|_| world.random.usize(0..count)));
        world.deed(format!("SIGSTOP workers {stopped:?}")).await;
        for worker in &stopped {
            world.workers[*worker].signal(Signal::STOP);
        }
        pause(lease * 2..lease * 2 + 1000, world, until.max(Instant::now() + Duration::from_millis(lease * 2))).await;
        for worker in &stopped {
            world.workers[*worker].signal(Signal::CONT);
        }
    }
}

async fn stop_replicas(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(1000..3000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let replica = world.random.usize(0..world.replicas.len());
        world.deed(format!("SIGSTOP replica {replica}")).await;
        world.replicas[replica].signal(Signal::STOP);
        pause(9000..12_000, world, until).await;
        world.replicas[replica].signal(Signal::CONT);
    }
}

/// Process ids of the server's sessions; those that listen, or those that do not.
async fn sessions(world: &World, listening: bool) -> anyhow::Result<Vec<i32>> {
    let rows = world
        .sql()
        .await?
        .query(
            "select pid from pg_stat_activity where application_name like 'absurd server%'
              and (application_name like '%listen%') = $1",
            &[&listening],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn kill(pid: i32, signal: Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

async fn kill_backend(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(3000..7000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let Ok(sessions) = sessions(world, false).await else { continue };
        if sessions.is_empty() {
            continue;
        }
        let session = sessions[world.random.usize(0..sessions.len())];
        world.deed(format!("SIGKILL session {session} of Postgres")).await;
        kill(session, Signal::KILL);
    }
}

async fn kill_postgres(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(3000..8000, world, until).await;
        if over(until) {
            return Ok(());
        }
        world.deed("SIGKILL of the postmaster").await;
        world.kill_postgres().await;
        world.start_postgres().await?;
    }
}

async fn stop_postgres(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(5000..12_000, world, until).await;
        if over(until) {
            return Ok(());
        }
        world.deed("Postgres stopped").await;
        world.stop_postgres().await;
        pause(0..2000, world, until).await;
        world.start_postgres().await?;
    }
}

async fn swallow(world: &mut World, until: Instant) -> anyhow::Result<()> {
    for link in &world.database {
        link.set(Toxic::Swallow(2));
    }
    while !over(until) {
        pause(2000..4000, world, until).await;
        world.deed("answers are lost after the commit, 1 in 50").await;
    }
    Ok(())
}

async fn hole_database(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(2000..4000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let replica = world.random.usize(0..world.database.len());
        world.deed(format!("black hole between replica {replica} and Postgres")).await;
        world.database[replica].set(Toxic::Hole(true, true));
        pause(12_000..20_000, world, until).await;
        world.database[replica].set(Toxic::Pass);
    }
}

async fn hole_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let count = world.workers.len();
    loop {
        pause(1000..3000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let toxics = [
            Toxic::Hole(true, true),
            Toxic::Hole(true, false),
            Toxic::Hole(false, true),
            Toxic::Late(400),
            Toxic::Slow(10_000),
            Toxic::Reset,
        ];
        let toxic = toxics[world.random.usize(0..toxics.len())];
        let cut: Vec<usize> = (0..count / 3).map(|_| world.random.usize(0..count)).collect();
        world.deed(format!("before workers {cut:?}: {toxic:?}")).await;
        for worker in &cut {
            world.before[*worker].iter().for_each(|link| link.set(toxic));
        }
        pause(5000..12_000, world, until).await;
        for worker in &cut {
            world.before[*worker].iter().for_each(|link| link.set(Toxic::Pass));
        }
    }
}

async fn half_open(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let count = world.workers.len();
    loop {
        pause(1000..3000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let cut: Vec<usize> = (0..count / 3).map(|_| world.random.usize(0..count)).collect();
        world.deed(format!("half-open links of workers {cut:?}")).await;
        for worker in &cut {
            world.before[*worker].iter().for_each(|link| link.set(Toxic::HalfOpen));
        }
        pause(3000..9000, world, until).await;
        for worker in &cut {
            world.before[*worker].iter().for_each(|link| link.set(Toxic::Pass));
        }
    }
}

async fn freeze_postgres(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(3000..6000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let rows = world.sql().await?.query("select pid from pg_stat_activity", &[]).await?;
        let processes: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
        world.deed("all processes of Postgres stand still").await;
        world.went_down();
        processes.iter().for_each(|pid| kill(*pid, Signal::STOP));
        pause(3000..6000, world, until).await;
        processes.iter().for_each(|pid| kill(*pid, Signal::CONT));
        world.up();
    }
}

async fn fail_over(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let mut failovers = 0;
    loop {
        world.add_standby(true).await?;
        pause(3000..6000, world, until).await;
        if over(until) && failovers > 0 {
            world.figures.push(("failovers", failovers));
            return Ok(());
        }
        world.deed("Postgres is killed for good, and its standby takes over").await;
        world.fail_over().await?;
        failovers += 1;
        pause(2000..4000, world, until).await;
    }
}

fn small_disk(size: &mut Size) {
    size.disk = Some(400);
    size.settings.extend(["max_wal_size=64MB".into(), "min_wal_size=32MB".into(), "shared_buffers=32MB".into()]);
}

async fn fill_disk(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(3000..6000, world, until).await;
        if over(until) {
            let refused = world.faults("disk_full").await;
            world.figures.push(("refused for want of room", refused));
            return Ok(());
        }
        if !world.fill_disk()? {
            println!("   this process may not mount a disk");
            return Ok(());
        }
        world.deed("the disk is full").await;
        pause(3000..6000, world, until.max(Instant::now() + Duration::from_secs(6))).await;
        world.free_disk().await?;
    }
}

/// Streams of the storm.
const STORM: (usize, usize) = (100, 100);

async fn storm(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let sql = world.sql().await?;
    sql.execute("select absurd.create_queue($1)", &[&crowd::QUEUE]).await?;
    let sessions = "select count(*) from pg_stat_activity where application_name like 'absurd server%'";
    let wanted = (STORM.0 * STORM.1) as f64;
    world.deed("the other replicas are stopped, and 10,000 streams open on one").await;
    for replica in 1..world.replicas.len() {
        world.replicas[replica].stop(Duration::from_secs(40)).await;
    }
    let (before, sessions_before) = (world.resident(0)?, sql.query_one(sessions, &[]).await?.get::<_, i64>(0));
    let _crowd = crowd::streams(world, STORM.0, STORM.1)?;
    while world.metric(0, "absurd_streams ").await.unwrap_or(0.0) < wanted {
        anyhow::ensure!(!over(until + Duration::from_secs(60)), "the streams do not open");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let grown = (world.resident(0)? - before) / i64::try_from(STORM.0 * STORM.1)?;
    let more = sql.query_one(sessions, &[]).await?.get::<_, i64>(0) - sessions_before;
    for replica in 1..world.replicas.len() {
        world.start_replica(replica).await?;
    }
    pause(2000..3000, world, until).await;
    world.deed("SIGKILL of the replica with 10,000 streams").await;
    let began = Instant::now();
    world.replicas[0].kill().await;
    loop {
        let mut there = 0.0;
        for replica in 1..world.replicas.len() {
            there += world.metric(replica, "absurd_streams ").await.unwrap_or(0.0);
        }
        if there >= wanted {
            break;
        }
        anyhow::ensure!(began.elapsed() < Duration::from_secs(120), "{there} of {wanted} streams came back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let took = i64::try_from(began.elapsed().as_millis())?;
    world.figures.extend([
        ("streams that came back", wanted as i64),
        ("bytes per idle stream", grown),
        ("sessions of Postgres for them", more),
        ("ms until all streams were back", took),
    ]);
    if took > 10_000 {
        world.findings.push(Finding { check: "C8", story: format!("10,000 streams were back after {took} ms") });
    }
    tokio::time::sleep_until(until).await;
    Ok(())
}

async fn crowd_out(world: &mut World, until: Instant) -> anyhow::Result<()> {
    world.sql().await?.execute("select absurd.create_queue($1)", &[&crowd::QUEUE]).await?;
    pause(2000..3000, world, until).await;
    world.deed("500 callers ask without end").await;
    let mut held = Vec::new();
    let shared = &*world;
    let hold = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        // Whoever comes now is told that there are too many clients.
        while let Ok(session) = shared.sql().await {
            held.push(session);
        }
        shared.deed("Postgres has no connection left").await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        held.clear();
    };
    let (heard, ()) = tokio::join!(crowd::callers(shared, 500, until), hold);
    let heard = heard?;
    world.figures.extend([
        ("answers for the crowd", heard.answered),
        ("refusals for the crowd", heard.refused),
        ("ms until a refusal, p99", i64::try_from(heard.refusals.value_at_quantile(0.99))?),
        ("calls out of time", heard.late),
    ]);
    Ok(())
}

async fn use_up_ids(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(3000..5000, world, until).await;
    world.sql().await?.batch_execute("create table chaos.old (n int)").await?;
    world.deed("transaction ids are used up").await;
    world.use_up_ids().await?;
    world.went_down();
    // Postgres would vacuum this table by itself, and could go on then.
    let holder = world.sql().await?;
    holder.batch_execute("begin; lock table chaos.old in share update exclusive mode").await?;
    let sql = world.sql().await?;
    let mut refused = 0;
    let began = Instant::now();
    while refused < 50 && began.elapsed() < Duration::from_secs(30) {
        let code =
            sql.execute("insert into chaos.old values (1)", &[]).await.err().and_then(|error| error.code().cloned());
        refused += i64::from(code == Some(tokio_postgres::error::SqlState::PROGRAM_LIMIT_EXCEEDED));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let told = world.faults("no_transaction_ids").await;
    world.figures.extend([("writes refused for want of ids", refused), ("of these to replicas", told)]);
    holder.batch_execute("rollback").await?;
    world.deed("Postgres may vacuum").await;
    let began = Instant::now();
    while sql.execute("insert into chaos.old values (1)", &[]).await.is_err() {
        anyhow::ensure!(began.elapsed() < Duration::from_secs(60), "Postgres gives out no ids");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    world.up();
    tokio::time::sleep_until(until).await;
    Ok(())
}

async fn flood(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(2000..3000, world, until).await;
    world.deed("floods").await;
    match crowd::floods(world, until).await? {
        Some((ended, most)) => {
            world.figures.extend([("floods ended", ended), ("frames of a flood at most", most)]);
        }
        None => world.findings.push(Finding { check: "C8", story: "a flood was taken without end".into() }),
    }
    Ok(())
}

async fn read_nothing(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(2000..3000, world, until).await;
    world.deed("workers ask, and read nothing").await;
    match crowd::silent_workers(world, until).await? {
        Some(cut) => world.figures.push(("silent workers cut", cut)),
        None => world.findings.push(Finding { check: "C8", story: "a worker that reads nothing was kept".into() }),
    }
    Ok(())
}

async fn jump_clock(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let sql = world.sql().await?;
    sql.batch_execute(
        "create table chaos.clock (ahead interval not null); insert into chaos.clock values ('0');
         create or replace function absurd.current_time() returns timestamptz language sql volatile as
         $$ select clock_timestamp() + (select ahead from chaos.clock) $$",
    )
    .await?;
    // Backwards only from a time that was ahead, so that what is due comes due before the end.
    for ahead in ["1 hour", "0", "30 days", "-1 hour", "10 minutes", "0"].iter().cycle() {
        pause(3000..6000, world, until).await;
        if over(until) {
            break;
        }
        world.deed(format!("the clock is {ahead} ahead")).await;
        sql.execute("update chaos.clock set ahead = $1::text::interval", &[ahead]).await?;
    }
    world.deed("the clock is 2 hours ahead, for good").await;
    sql.execute("update chaos.clock set ahead = '31 days'", &[]).await?;
    Ok(())
}

async fn hold_rows(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(1000..3000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let what = [
            "absurd.t_chaos where state = 'running'",
            "absurd.t_chaos",
            "absurd.r_chaos where state = 'running'",
            "absurd.r_chaos where state = 'pending'",
        ];
        let what = what[world.random.usize(0..what.len())];
        world.deed(format!("rows held: {what}")).await;
        let sql = world.sql().await?;
        sql.batch_execute(&format!("begin; select from {what} for update")).await?;
        pause(2000..6000, world, until).await;
        sql.batch_execute("rollback").await?;
    }
}

async fn pin_snapshot(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(2000..3000, world, until).await;
    let sql = world.sql().await?;
    world.deed("a snapshot is pinned").await;
    sql.batch_execute("begin isolation level repeatable read; select count(*) from absurd.t_chaos").await?;
    tokio::time::sleep_until(until).await;
    Ok(())
}

async fn roll(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        for replica in 0..world.replicas.len() {
            pause(500..1500, world, until).await;
            if over(until) {
                return Ok(());
            }
            world.deed(format!("SIGTERM replica {replica}")).await;
            let began = Instant::now();
            let code = world.replicas[replica].stop(Duration::from_secs(40)).await;
            world.restarted(began.elapsed(), code);
            world.start_replica(replica).await?;
        }
    }
}

async fn kill_listener(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let malformed = ["", "x", "w", "w:", "d\u{1}", "{\"a\":", "c:nobody:99999999999999999999", &"q".repeat(7000)]
        .map(str::to_owned);
    loop {
        pause(500..1500, world, until).await;
        if over(until) {
            return Ok(());
        }
        world.deed("the listening sessions are killed; malformed notifications").await;
        for session in sessions(world, true).await? {
            world.sql().await?.execute("select pg_terminate_backend($1)", &[&session]).await?;
        }
        let sql = world.sql().await?;
        for payload in &malformed {
            sql.execute("select pg_notify('absurd_server', $1)", &[payload]).await?;
        }
    }
}

async fn clean_events(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let client = absurd_client::AbsurdClient::connect(&absurd_client::ConnectOptions::new(world.replica_url(0)))?;
    let client = client.with_queue(crate::shape::QUEUE);
    pause(2000..3000, world, until).await;
    world.deed("events are cleaned up without a pause").await;
    while !over(until) {
        // Old are only the marks of events that somebody waits for.
        client.cleanup_events(Duration::from_secs(3600), Some(1000)).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn long_stop(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(3000..4000, world, until).await;
    world.deed("Postgres is down for 30 s").await;
    world.stop_postgres().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    world.start_postgres().await?;
    tokio::time::sleep_until(until).await;
    Ok(())
}

async fn swizzle(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(1000..2000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let mut links: Vec<(usize, usize)> = (0..world.before.len())
            .flat_map(|client| (0..world.replicas.len()).map(move |replica| (client, replica)))
            .collect();
        world.random.shuffle(&mut links);
        world.deed("all links stop one by one, and heal in another order").await;
        for (client, replica) in &links {
            world.before[*client][*replica].set(Toxic::Hole(true, true));
            pause(10..60, world, until).await;
        }
        for link in &world.database {
            link.set(Toxic::Hole(true, true));
        }
        pause(500..2000, world, until).await;
        world.random.shuffle(&mut links);
        for link in &world.database {
            link.set(Toxic::Pass);
        }
        for (client, replica) in &links {
            world.before[*client][*replica].set(Toxic::Pass);
            pause(10..60, world, until).await;
        }
    }
}

async fn starve_descriptors(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(1000..2000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let replica = world.random.usize(0..world.replicas.len());
        let Some(port) = world.replica_url(replica).rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok())
        else {
            return Ok(());
        };
        world.deed(format!("replica {replica} may open 100 files, and 200 connections come")).await;
        world.limit_files(replica, 100)?;
        let mut silent = Vec::new();
        for _ in 0..200 {
            // Those that find no room even in the queue of the socket hear nothing.
            let connecting = tokio::net::TcpStream::connect(("127.0.0.1", port));
            let Ok(connected) = tokio::time::timeout(Duration::from_millis(200), connecting).await else { break };
            silent.extend(connected);
        }
        pause(3000..5000, world, until).await;
        drop(silent);
        world.limit_files(replica, 1024)?;
    }
}

/// A bug that is planted, and must be found.
pub(crate) struct Bug {
    pub name: &'static str,
    /// The server's own bug, by the name that `server/src/planted.rs` gives it; None: it is planted around the server.
    pub planted: Option<&'static str>,
    pub scenario: Scenario,
    /// Any of these checks finds it.
    pub found_by: &'static [&'static str],
}

/// The planted bugs.
pub(crate) fn bugs() -> Vec<Bug> {
    vec![
        Bug {
            name: "a spawn of which nothing is known is made again as another task",
            planted: None,
            scenario: scenario!("B-new-id", "answers lost, new ids", lose_answers, size: |size| size.new_id_when_unknown = true),
            found_by: &["C2"],
        },
        Bug {
            name: "commits are acknowledged before they are flushed",
            planted: None,
            scenario: scenario!("B-no-flush", "synchronous_commit off, postmaster killed", kill_postgres, size: |size| {
                size.settings.extend(["synchronous_commit=off".into(), "wal_writer_delay=10s".into()]);
            }),
            found_by: &["C1", "C5", "C6", "C7"],
        },
        Bug {
            name: "a standby that has not heard everything takes over",
            planted: None,
            scenario: scenario!("B-standby", "a standby that was cut off takes over", fail_over_early),
            found_by: &["C1", "C5", "C6"],
        },
        Bug {
            name: "a cleanup deletes events by the age that they had when it looked",
            planted: None,
            scenario: scenario!("B-cleanup", "careless cleanup beside traffic", clean_carelessly),
            found_by: &["C1", "C7", "C8"],
        },
        Bug {
            name: "the network swaps messages of a stream",
            planted: None,
            scenario: scenario!("B-reorder", "frames change places", reorder),
            found_by: &["C12", "C8", "C1"],
        },
        Bug {
            name: "no token check",
            planted: Some("NoTokenCheck"),
            scenario: scenario!("B-token", "workers come back late", stop_workers, size: short_lease),
            found_by: &["C4"],
        },
        Bug {
            name: "completions are acknowledged before they are committed",
            planted: Some("EarlyAck"),
            scenario: scenario!("B-early", "SIGKILL of the postmaster", kill_postgres),
            found_by: &["C6"],
        },
        Bug {
            name: "what a lost stream has delivered is given back at once",
            planted: Some("ReleaseAfterDelivery"),
            scenario: scenario!("B-release", "links of workers are reset while they work for long", reset_workers, size: |size| size.work = 1000),
            found_by: &["C9"],
        },
        Bug {
            name: "a sweep of expired leases stops at its first error",
            planted: Some("FaintSweep"),
            scenario: scenario!("B-sweep", "poisoned runs, and workers killed", poison, size: short_lease),
            found_by: &["C8", "C9"],
        },
    ]
}

async fn fail_over_early(world: &mut World, until: Instant) -> anyhow::Result<()> {
    world.add_standby(false).await?;
    pause(2000..3000, world, until).await;
    world.cut_standby().await?;
    pause(3000..4000, world, until).await;
    world.deed("a standby that has not heard of the last seconds takes over").await;
    world.fail_over().await?;
    tokio::time::sleep_until(until).await;
    Ok(())
}

async fn lose_answers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    while !over(until) {
        pause(500..1500, world, until).await;
        world.deed("producers ask and hear nothing").await;
        for link in world.before[world.size.workers..].iter().flatten() {
            link.set(Toxic::Hole(false, true));
        }
        pause(1000..2000, world, until).await;
        world.heal_links();
    }
    Ok(())
}

async fn reset_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let count = world.workers.len();
    while !over(until) {
        pause(1000..2000, world, until).await;
        let cut: Vec<usize> = (0..count / 3).map(|_| world.random.usize(0..count)).collect();
        world.deed(format!("links of workers {cut:?} are reset")).await;
        for toxic in [Toxic::Reset, Toxic::Pass] {
            cut.iter().flat_map(|worker| &world.before[*worker]).for_each(|link| link.set(toxic));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Runs whose lease has run out and whose failure raises: what must not keep the sweeps from everybody else's.
async fn poison(world: &mut World, until: Instant) -> anyhow::Result<()> {
    world.deed("five runs are poisoned: whatever would fail them is refused").await;
    world.sql().await?.batch_execute(include_str!("poison.sql")).await?;
    kill_workers(world, until).await
}

async fn clean_carelessly(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let sql = world.sql().await?;
    world.deed("events are cleaned up by what was seen a moment ago").await;
    while !over(until) {
        let old =
            sql.query("select event_name from absurd.e_chaos where emitted_at < now() - interval '1 day'", &[]).await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let names: Vec<String> = old.iter().map(|row| row.get(0)).collect();
        sql.execute("delete from absurd.e_chaos where event_name = any($1)", &[&names]).await?;
    }
    Ok(())
}

async fn reorder(world: &mut World, until: Instant) -> anyhow::Result<()> {
    world.deed("messages change places").await;
    // Only for connections from now on: frames are counted from their beginning.
    for link in &world.before[0] {
        link.set(Toxic::Reset);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    for link in &world.before[0] {
        link.set(Toxic::Reorder);
    }
    tokio::time::sleep_until(until).await;
    Ok(())
}

/// Any of the others, one after the other, each for a while.
pub(crate) fn random() -> Scenario {
    scenario!("random", "faults at random, one after the other", at_random)
}

async fn at_random(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let all: Vec<Scenario> = all().into_iter().filter(|scenario| scenario.at_random && scenario.id != "F0").collect();
    while !over(until) {
        let scenario = &all[world.random.usize(0..all.len())];
        let span = Duration::from_millis(world.random.u64(8_000..20_000));
        (scenario.act)(world, until.min(Instant::now() + span)).await?;
        world.heal().await?;
    }
    Ok(())
}
