//! Those who come in great numbers beside the load: idle streams, callers without end, attackers. They keep no books; what
//! becomes of them is counted.

use std::time::Duration;

use absurd_client::{AbsurdClient, ConnectOptions, ListOptions, Reason, SpawnOptions, StreamOptions};
use absurd_tests::{Attacker, Flood};
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::world::World;

/// Queue of the crowd; nobody else knows it.
pub(crate) const QUEUE: &str = "crowd";
/// Replicas that silent workers come to cut them after this long.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(2);

fn client(world: &World, deadline: Duration) -> anyhow::Result<AbsurdClient> {
    let urls: Vec<String> = (0..world.replicas.len()).map(|replica| world.replica_url(replica)).collect();
    let options = ConnectOptions { deadline, ..ConnectOptions::new(urls.join(",")) };
    Ok(AbsurdClient::connect(&options)?.with_queue(QUEUE))
}

/// Opens streams on connections, so many on each; they open again by themselves, as any worker's would.
pub(crate) fn streams(world: &World, connections: usize, each: usize) -> anyhow::Result<JoinSet<()>> {
    let mut crowd = JoinSet::new();
    for _ in 0..connections {
        let client = client(world, Duration::from_secs(30))?;
        for _ in 0..each {
            let client = client.clone();
            crowd.spawn(async move {
                loop {
                    if let Ok(mut stream) = client.claim_stream(StreamOptions::default()).await {
                        while stream.next().await.is_some() {}
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
        }
    }
    Ok(crowd)
}

/// What callers heard.
#[derive(Debug)]
pub(crate) struct Heard {
    pub answered: i64,
    pub refused: i64,
    /// Heard nothing before their deadline.
    pub late: i64,
    /// Until a refusal came, ms.
    pub refusals: Histogram<u64>,
}

/// So many callers ask until a time, one call after the other, each with a deadline of five seconds.
pub(crate) async fn callers(world: &World, count: usize, until: Instant) -> anyhow::Result<Heard> {
    let client = client(world, Duration::from_secs(5))?;
    let mut crowd = JoinSet::new();
    for caller in 0..count {
        let client = client.clone();
        crowd.spawn(async move {
            let (mut answered, mut late, mut refusals) = (0, 0, Vec::new());
            let page = ListOptions { page_size: 1000, ..ListOptions::default() };
            while Instant::now() < until {
                let began = Instant::now();
                let answer = match caller % 3 {
                    0 => client.get_queue_stats().await.map(drop),
                    1 => client.list_tasks(page.clone()).await.map(drop),
                    _ => client.spawn_task("crowd", &caller, SpawnOptions::default()).await.map(drop),
                };
                match answer {
                    Ok(()) => answered += 1,
                    Err(error) if error.reason() == Reason::DeadlineExceeded => late += 1,
                    Err(_) => refusals.push(began.elapsed()),
                }
            }
            (answered, late, refusals)
        });
    }
    let mut heard = Heard { answered: 0, refused: 0, late: 0, refusals: Histogram::new(3)? };
    while let Some(one) = crowd.join_next().await {
        let (answered, late, refusals) = one?;
        heard.answered += answered;
        heard.late += late;
        heard.refused += i64::try_from(refusals.len())?;
        for took in refusals {
            heard.refusals.record(u64::try_from(took.as_millis())?)?;
        }
    }
    Ok(heard)
}

/// Workers that ask every replica for tasks and read nothing, until a time: how many of their connections were cut; none if
/// one was kept for ten times as long as it may be.
pub(crate) async fn silent_workers(world: &World, until: Instant) -> anyhow::Result<Option<i64>> {
    let mut cut = 0;
    while Instant::now() < until {
        for replica in 0..world.replicas.len() {
            let mut silent = Attacker::connect(&world.replica_url(replica)).await?;
            // No window at all: nothing can be sent on its streams.
            silent.settings(&[(4, 0)]).await?;
            let request = absurd_proto::v1::ClaimStreamRequest {
                queue: crate::shape::QUEUE.into(),
                worker_id: "silent".into(),
                max_in_flight: 20,
                ..Default::default()
            };
            silent.claim_stream(1, &request).await?;
            if tokio::time::timeout(10 * STALL_MAX, silent.end()).await.is_err() {
                return Ok(None);
            }
            cut += 1;
        }
    }
    Ok(Some(cut))
}

/// Floods of every kind against all replicas, one after the other, until a time: how many ended as they should, and the
/// most frames that one took; a flood without end is none.
pub(crate) async fn floods(world: &World, until: Instant) -> anyhow::Result<Option<(i64, i64)>> {
    let (mut ended, mut most) = (0, 0);
    while Instant::now() < until {
        for replica in 0..world.replicas.len() {
            for kind in Flood::ALL {
                let mut attacker = Attacker::connect(&world.replica_url(replica)).await?;
                let Some(frames) = attacker.flood(kind).await? else { return Ok(None) };
                most = most.max(i64::from(frames));
                ended += 1;
            }
        }
    }
    Ok(Some((ended, most)))
}
