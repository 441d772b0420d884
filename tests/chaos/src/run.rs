//! One run: a world, a load, a scenario; then heal, wait until all is done, and check both books.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use absurd_client::{AbsurdClient, ConnectOptions};
use tokio::time::Instant;

use crate::ledger::{self, Books, Finding, Verdict};
use crate::scenario::Scenario;
use crate::shape::QUEUE;
use crate::world::{Deed, Size, World};

/// Longest time from the end of all faults until every task has ended.
const HEAL_MAX: Duration = Duration::from_secs(90);
/// Findings of one check that are told.
const TOLD_MAX: usize = 5;
/// Faults that are told of a run that is not good.
const DEEDS_TOLD_MAX: usize = 30;
/// Claims that a fault must meet to count, and such faults that a run needs.
const LEASES_MET: i64 = 3;

/// What a run brought.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub verdict: Verdict,
    /// From the end of the faults until every task had ended.
    pub healed: Option<Duration>,
    pub deeds: Vec<Deed>,
    pub swallowed: u64,
    pub restarts: Vec<(Duration, Option<i32>)>,
    pub checked: Duration,
    /// What must have happened and did not: the run says nothing.
    pub vacuous: Vec<String>,
}

/// How long and how.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub size: Size,
    pub span: Duration,
    /// Goes on until the producers have ended, instead of for a span.
    pub until_done: bool,
    pub home: PathBuf,
    /// Keep the books.
    pub keep: bool,
}

/// Runs a scenario.
pub(crate) async fn run(scenario: &Scenario, mut plan: Plan) -> anyhow::Result<Outcome> {
    (scenario.size)(&mut plan.size);
    let home = plan.home.join(format!("{}-{}", scenario.id, plan.size.seed));
    let _ = std::fs::remove_dir_all(&home);
    let mut world = World::start(&home, plan.size.clone()).await?;
    world.load().await?;
    let samples = Arc::new(Mutex::new(Vec::new()));
    let sampler = tokio::spawn(sample(Arc::clone(&world.address), Arc::clone(&samples)));
    let began = Instant::now();
    if plan.until_done {
        while world.producers.iter_mut().any(crate::world::Process::is_running) {
            (scenario.act)(&mut world, Instant::now() + plan.span).await?;
            progress(&world, began).await;
        }
    } else {
        (scenario.act)(&mut world, began + plan.span).await?;
    }
    world.heal().await?;
    let healed = drain(&mut world).await;
    let mut problems = answers(&world).await;
    let mut seen = 0.0;
    for replica in 0..world.replicas.len() {
        seen += world.metric(replica, "absurd_rpcs_total{method=\"SpawnTask\"").await.unwrap_or(0.0);
    }
    world.figures.push(("spawn calls that replicas saw", seen as i64));
    sampler.abort();
    if let Ok(samples) = samples.lock() {
        problems.extend(samples.iter().cloned());
    }
    let outcome = judge(scenario, &mut world, healed, problems).await?;
    drop(world);
    if !plan.keep && outcome.verdict.findings.is_empty() {
        let _ = std::fs::remove_dir_all(&home);
    }
    Ok(outcome)
}

async fn progress(world: &World, began: Instant) {
    let Ok(sql) = world.sql().await else { return };
    let count = "select (select count(*) from absurd.t_chaos),
                        (select count(*) from absurd.r_chaos where state = 'running'), (select max(seq) from chaos.audit)";
    if let Ok(row) = sql.query_one(count, &[]).await {
        let (tasks, running, audit): (i64, i64, Option<i64>) = (row.get(0), row.get(1), row.get(2));
        println!(
            "{:>6} s: {tasks} tasks, {running} claimed, {} audit rows",
            began.elapsed().as_secs(),
            audit.unwrap_or(0)
        );
    }
}

/// Lets the producers end and waits until every task has ended.
async fn drain(world: &mut World) -> Option<Duration> {
    let began = Instant::now();
    let stopping = world.producers.iter_mut().map(|producer| producer.stop(HEAL_MAX));
    futures_util::future::join_all(stopping).await;
    while began.elapsed() < HEAL_MAX {
        if let Ok(sql) = world.sql().await {
            let left = "select exists (select from absurd.t_chaos
                          where state in ('pending', 'sleeping', 'running') and task_name <> 'poison')";
            if let Ok(row) = sql.query_one(left, &[]).await
                && !row.get::<_, bool>(0)
            {
                return Some(began.elapsed());
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    None
}

/// The last five answers of every replica are good ones.
async fn answers(world: &World) -> Vec<Finding> {
    let mut problems = Vec::new();
    for replica in 0..world.replicas.len() {
        let Ok(client) = AbsurdClient::connect(&ConnectOptions::new(world.replica_url(replica))) else { continue };
        let client = client.with_queue(QUEUE);
        for _ in 0..5 {
            if let Err(error) = client.get_queue_stats().await {
                problems.push(Finding { check: "C8", story: format!("replica {replica} answers {error}") });
            }
        }
    }
    problems
}

/// Looks every two seconds, and less often the longer a look takes, in one snapshot, whether what was spawned is what
/// lives and what has ended.
async fn sample(address: Arc<Mutex<String>>, problems: Arc<Mutex<Vec<Finding>>>) {
    let look = "with live as (
                  select t.task_id, t.state in ('pending', 'sleeping', 'running') as live,
                         count(r.run_id) filter (where r.state in ('pending', 'sleeping', 'running')) as runs
                    from absurd.t_chaos t left join absurd.r_chaos r using (task_id)
                   where t.task_name <> 'poison' group by t.task_id, t.state)
                select count(*) filter (where live and runs <> 1), count(*) filter (where not live and runs <> 0),
                       count(*) - (select count(*) filter (where op = 'I') - count(*) filter (where op = 'D')
                                     from chaos.audit where kind = 't') from live";
    let mut pause = Duration::from_secs(2);
    loop {
        tokio::time::sleep(pause).await;
        let began = Instant::now();
        let url = address.lock().map(|url| url.clone()).unwrap_or_default();
        let Ok((client, connection)) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await else { continue };
        let connection = tokio::spawn(connection);
        let rows = client.query_one(look, &[]).await;
        drop(client);
        let _ = connection.await;
        pause = Duration::from_secs(2).max(began.elapsed() * 20);
        let Ok(row) = rows else { continue };
        let (without, with, drift): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        if (without, with, drift) != (0, 0, 0)
            && let Ok(mut problems) = problems.lock()
        {
            let story =
                format!("{without} live tasks without their one live run, {with} ended ones with one, drift {drift}");
            problems.push(Finding { check: "C10", story });
        }
    }
}

async fn judge(
    scenario: &Scenario,
    world: &mut World,
    healed: Option<Duration>,
    problems: Vec<Finding>,
) -> anyhow::Result<Outcome> {
    world.stop().await;
    let mut books = Books {
        down: world.down.clone(),
        clock_moved: scenario.moves_clock,
        redelivery_max: i64::try_from(world.size.redelivery_max.as_micros()).unwrap_or(i64::MAX),
        ..Books::default()
    };
    ledger::read_histories(&world.home, &mut books)?;
    ledger::read_audit(&world.sql().await?, &mut books).await?;
    let began = Instant::now();
    let mut verdict = ledger::check(&books);
    let checked = began.elapsed();
    verdict.findings.extend(problems);
    verdict.findings.append(&mut world.findings);
    verdict.figures.extend(world.figures.iter().copied());
    if healed.is_none() {
        verdict
            .findings
            .push(Finding { check: "C8", story: "not every task had ended 90 s after the last fault".into() });
    }
    let deeds = world.deeds.lock().map(|deeds| deeds.clone()).unwrap_or_default();
    for (took, code) in &world.restarts {
        if *code != Some(0) {
            verdict
                .findings
                .push(Finding { check: "C8", story: format!("a replica ended with {code:?} after {took:?}") });
        }
    }
    verdict.figures.insert("restarts", i64::try_from(world.restarts.len()).unwrap_or(0));
    let vacuous = vacuous(scenario, &verdict, &deeds);
    Ok(Outcome {
        verdict,
        healed,
        deeds,
        swallowed: world.swallowed(),
        restarts: world.restarts.clone(),
        checked,
        vacuous,
    })
}

/// C0: what would make a run say nothing.
fn vacuous(scenario: &Scenario, verdict: &Verdict, deeds: &[Deed]) -> Vec<String> {
    let figure = |name: &str| verdict.figures.get(name).copied().unwrap_or(0);
    let mut missing = Vec::new();
    if figure("acknowledged") * 5 < figure("calls") || figure("tasks") < 50 {
        missing.push("too little was acknowledged".to_owned());
    }
    if figure("streams watched") == 0 {
        missing.push("no stream was watched: tests/setup prepares the Python worker".into());
    }
    if scenario.id != "F0" && !deeds.iter().any(|deed| deed.leases >= LEASES_MET) {
        missing.push("no fault met a claim".into());
    }
    for (name, least) in scenario.evidence.iter().filter(|(name, least)| figure(name) < *least) {
        missing.push(format!("{name}: {}, at least {least} are needed", figure(name)));
    }
    missing
}

/// Prints an outcome; whether it is good.
pub(crate) fn tell(scenario: &Scenario, seed: u64, outcome: &Outcome, home: &Path) -> bool {
    let verdict = &outcome.verdict;
    let good = verdict.findings.is_empty() && outcome.vacuous.is_empty();
    let word = match (verdict.findings.is_empty(), outcome.vacuous.is_empty()) {
        (true, true) => "good",
        (true, false) => "UNKNOWN",
        _ => "BROKEN",
    };
    let healed = outcome.healed.map_or_else(|| "never".to_owned(), |healed| format!("{:.1} s", healed.as_secs_f64()));
    println!(
        "{} seed {seed}: {word}. {} faults; healed in {healed}; checked in {:.1} s",
        scenario.id,
        outcome.deeds.len(),
        outcome.checked.as_secs_f64()
    );
    let figures: Vec<String> = verdict.figures.iter().map(|(name, value)| format!("{name} {value}")).collect();
    println!("   {}", figures.join(", "));
    for (what, times) in [
        ("from spawn to the first claim", &verdict.first_claim),
        ("from the end of a lease to the next claim", &verdict.redelivery),
    ] {
        let at = |quantile| ledger::quantile(times, quantile);
        if !times.is_empty() {
            println!("   {what}: p50 {} ms, p99 {} ms, max {} ms", at(0.5), at(0.99), at(1.0));
        }
    }
    if outcome.swallowed > 0 {
        println!("   answers of Postgres lost: {}", outcome.swallowed);
    }
    if let Some(longest) = outcome.restarts.iter().map(|(took, _)| took).max() {
        println!("   longest shutdown: {:.1} s", longest.as_secs_f64());
    }
    for missing in &outcome.vacuous {
        println!("   says nothing: {missing}");
    }
    let mut told = std::collections::HashMap::new();
    for finding in &verdict.findings {
        let count = told.entry(finding.check).or_insert(0);
        *count += 1;
        if *count <= TOLD_MAX {
            println!("   {}: {}", finding.check, finding.story);
        }
    }
    for (check, count) in told.iter().filter(|(_, count)| **count > TOLD_MAX) {
        println!("   {check}: {} more", count - TOLD_MAX);
    }
    if !good {
        let began = outcome.deeds.first().map_or(0, |deed| deed.at);
        for deed in outcome.deeds.iter().take(DEEDS_TOLD_MAX) {
            let seconds = (deed.at - began) as f64 / 1e6;
            println!("   {seconds:>6.1} s  {} ({} claims held)", deed.what, deed.leases);
        }
        let how = if scenario.id.starts_with("B-") { "bugs" } else { "run" };
        println!("   books and logs: {}; again: chaos {how} {} --seed {seed}", home.display(), scenario.id);
    }
    good
}
