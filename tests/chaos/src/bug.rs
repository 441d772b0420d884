//! The bugs that are planted, around the server or in it, and the checks that must find them: the test of the test.

use std::time::Duration;

use absurd_tests::Toxic;
use tokio::time::Instant;

use crate::fault::{
    break_other_queues, kill_postgres, over, pause, poison, replace_workers, reset_workers, short_lease,
    short_lease_found_soon, stubborn,
};
use crate::scenario::{Scenario, scenario};
use crate::world::{Size, World};

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
            scenario: scenario!("B-token", "workers go on with claims that others have", replace_workers, size: stubborn),
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
        Bug {
            name: "a look at many queues fails as a whole where one of them cannot be looked at",
            planted: Some("OneForAll"),
            scenario: scenario!("B-queue", "other queues are broken, and workers killed", break_other_queues, size: short_lease_found_soon),
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
    while !over(until) {
        // Streams are open by then, and claims are held.
        pause(1000..3000, world, until).await;
        world.deed("messages change places").await;
        // Only for connections from now on: frames are counted from their beginning.
        for link in &world.before[0] {
            link.set(Toxic::Reset);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        for link in &world.before[0] {
            link.set(Toxic::Reorder);
        }
    }
    Ok(())
}
