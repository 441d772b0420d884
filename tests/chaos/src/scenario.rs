//! The scenarios, as design numbers them: a fault each, the world that it needs, and what must have come of it.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::Instant;

use crate::fault::*;
use crate::world::{Size, World};

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
pub(crate) use scenario;

/// All scenarios.
pub(crate) fn all() -> Vec<Scenario> {
    vec![
        scenario!("F0", "no fault at all", nothing),
        scenario!("F1", "SIGKILL of a replica, again and again", kill_replicas),
        scenario!("F2", "SIGKILL of all replicas, and nobody there for a while", kill_all_replicas, evidence: &[("leases that ran out", 1)]),
        scenario!("F3", "SIGKILL of workers in the middle of steps", kill_workers, evidence: &[("leases that ran out", 1)]),
        scenario!("F4", "SIGSTOP of workers for two leases: they come back late", stop_workers, size: short_lease, evidence: &[("late writes refused", 1)]),
        scenario!("F4b", "workers go on with claims that they have lost or given back, while others have the runs", replace_workers, size: stubborn, evidence: &[("late writes refused", 20), ("claims given back", 5)]),
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
        scenario!("F32", "other queues cannot be read or are locked, and workers are killed", break_other_queues, size: short_lease_found_soon, evidence: &[("leases that ran out", 1)], random: false),
    ]
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
