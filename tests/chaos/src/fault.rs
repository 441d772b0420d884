//! The faults: what each scenario does to its world beside the load, until its time is over; and worlds that a fault needs.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use absurd_client::{AbsurdClient, ClaimOptions, ConnectOptions};
use absurd_tests::Toxic;
use rustix::process::Signal;
use tokio::time::Instant;

use crate::crowd;
use crate::ledger::Finding;
use crate::world::{Size, World};

pub(crate) fn short_lease(size: &mut Size) {
    size.lease = 4;
    size.flags.extend(["--heartbeat".into(), "1s".into()]);
}

/// Broken queues delay no other: a lease that has run out is found within a few ticks. Half of the usual tasks come, so that the
/// claim that follows waits for no worker.
pub(crate) fn short_lease_found_soon(size: &mut Size) {
    short_lease(size);
    size.rate /= 2.0;
    size.redelivery_max = Duration::from_secs(5);
}

pub(crate) fn stubborn(size: &mut Size) {
    size.work = 500;
    size.stubborn = true;
}

pub(crate) fn short_stall(size: &mut Size) {
    let stall = format!("{}s", crowd::STALL_MAX.as_secs());
    size.flags.extend(["--max-stall".into(), stall, "--heartbeat".into(), "1s".into()]);
}

pub(crate) fn long_work_on_four_connections(size: &mut Size) {
    size.connections = 4;
    size.work = 200;
}

pub(crate) async fn pause(range: Range<u64>, world: &mut World, until: Instant) {
    let ms = world.random.u64(range);
    tokio::time::sleep_until(until.min(Instant::now() + Duration::from_millis(ms))).await;
}

pub(crate) fn over(until: Instant) -> bool {
    Instant::now() >= until
}

pub(crate) async fn nothing(_: &mut World, until: Instant) -> anyhow::Result<()> {
    tokio::time::sleep_until(until).await;
    Ok(())
}

pub(crate) async fn kill_replicas(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn kill_all_replicas(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn kill_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn stop_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

/// What workers at work have delivered goes to others, who are at work on the same runs when those come back.
pub(crate) async fn replace_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    loop {
        pause(1000..2000, world, until).await;
        if over(until) {
            return Ok(());
        }
        let count = world.workers.len();
        let stopped: Vec<usize> = (0..count / 3).map(|_| world.random.usize(0..count)).collect();
        world.deed(format!("SIGSTOP workers {stopped:?}, and their links are reset")).await;
        for worker in &stopped {
            world.workers[*worker].signal(Signal::STOP);
        }
        reset_links(world, &stopped).await;
        // Longer than their places are kept, shorter than their leases.
        pause(6000..7000, world, until.max(Instant::now() + Duration::from_secs(6))).await;
        for worker in &stopped {
            world.workers[*worker].signal(Signal::CONT);
        }
    }
}

pub(crate) async fn stop_replicas(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn kill_backend(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn kill_postgres(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn stop_postgres(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn swallow(world: &mut World, until: Instant) -> anyhow::Result<()> {
    for link in &world.database {
        link.set(Toxic::Swallow(2));
    }
    while !over(until) {
        pause(2000..4000, world, until).await;
        world.deed("answers are lost after the commit, 1 in 50").await;
    }
    Ok(())
}

pub(crate) async fn hole_database(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn hole_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn half_open(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn freeze_postgres(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn fail_over(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) fn small_disk(size: &mut Size) {
    size.disk = Some(400);
    size.settings.extend(["max_wal_size=64MB".into(), "min_wal_size=32MB".into(), "shared_buffers=32MB".into()]);
}

pub(crate) async fn fill_disk(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn storm(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn crowd_out(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn use_up_ids(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn flood(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn read_nothing(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(2000..3000, world, until).await;
    world.deed("workers ask, and read nothing").await;
    match crowd::silent_workers(world, until).await? {
        Some(cut) => world.figures.push(("silent workers cut", cut)),
        None => world.findings.push(Finding { check: "C8", story: "a worker that reads nothing was kept".into() }),
    }
    Ok(())
}

pub(crate) async fn jump_clock(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn hold_rows(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn pin_snapshot(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(2000..3000, world, until).await;
    let sql = world.sql().await?;
    world.deed("a snapshot is pinned").await;
    sql.batch_execute("begin isolation level repeatable read; select count(*) from absurd.t_chaos").await?;
    tokio::time::sleep_until(until).await;
    Ok(())
}

pub(crate) async fn roll(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn kill_listener(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn clean_events(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let client = AbsurdClient::connect(&ConnectOptions::new(world.replica_url(0)))?;
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

pub(crate) async fn long_stop(world: &mut World, until: Instant) -> anyhow::Result<()> {
    pause(3000..4000, world, until).await;
    world.deed("Postgres is down for 30 s").await;
    world.stop_postgres().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    world.start_postgres().await?;
    tokio::time::sleep_until(until).await;
    Ok(())
}

pub(crate) async fn swizzle(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn starve_descriptors(world: &mut World, until: Instant) -> anyhow::Result<()> {
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

pub(crate) async fn reset_workers(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let count = world.workers.len();
    while !over(until) {
        pause(1000..2000, world, until).await;
        let cut: Vec<usize> = (0..count / 3).map(|_| world.random.usize(0..count)).collect();
        world.deed(format!("links of workers {cut:?} are reset")).await;
        reset_links(world, &cut).await;
    }
    Ok(())
}

async fn reset_links(world: &World, workers: &[usize]) {
    for toxic in [Toxic::Reset, Toxic::Pass] {
        workers.iter().flat_map(|worker| &world.before[*worker]).for_each(|link| link.set(toxic));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Runs whose lease has run out and whose failure raises: what must not keep the sweeps from everybody else's.
pub(crate) async fn poison(world: &mut World, until: Instant) -> anyhow::Result<()> {
    world.deed("five runs are poisoned: whatever would fail them is refused").await;
    world.sql().await?.batch_execute(include_str!("poison.sql")).await?;
    kill_workers(world, until).await
}

/// Ways in which a queue cannot be looked at, as statements on the queue `K`.
const BROKEN: [(&str, &str); 3] = [
    ("renamed", "alter table absurd.r_K rename column available_at to then_at"),
    ("unreadable", "alter table absurd.r_K rename to r_K_away; create view absurd.r_K as select 1 / 0 as run_id"),
    ("halved", "drop table absurd.t_K cascade"),
];

/// Asks for tasks that never come, so that the replicas look at the queues as often as at any that is in use.
async fn ask_for_ever(callers: &[AbsurdClient]) -> Infallible {
    loop {
        let asked = callers.iter().map(|caller| caller.claim_task(ClaimOptions::default()));
        futures_util::future::join_all(asked).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Queues beside the one under load are broken or locked, while its workers are killed.
pub(crate) async fn break_other_queues(world: &mut World, until: Instant) -> anyhow::Result<()> {
    let sql = world.sql().await?;
    for (queue, how) in BROKEN {
        sql.batch_execute(&format!("select absurd.create_queue('{queue}'); {}", how.replace('K', queue))).await?;
    }
    sql.batch_execute(
        "select absurd.create_queue('locked'); begin; lock table absurd.r_locked in access exclusive mode",
    )
    .await?;
    world.deed("three other queues are broken, and one is locked; workers ask for their tasks").await;
    let mut callers = Vec::new();
    for replica in 0..world.replicas.len() {
        let options =
            ConnectOptions { deadline: Duration::from_secs(2), ..ConnectOptions::new(world.replica_url(replica)) };
        let client = AbsurdClient::connect(&options)?;
        callers.extend(BROKEN.iter().map(|(queue, _)| client.with_queue(*queue)).chain([client.with_queue("locked")]));
    }
    let killed = tokio::select! {
        killed = kill_workers(world, until) => killed,
        never = ask_for_ever(&callers) => match never {},
    };
    sql.batch_execute("rollback; select absurd.drop_queue('locked')").await?;
    killed
}
