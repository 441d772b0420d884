//! `absurd doctor`: looks for faults in a database, and says how to mend them. It changes nothing.

use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;
use tokio_postgres::Row;

use super::output::{self, Output, out};
use crate::domain::QueueName;
use crate::scope::Caller;
use crate::settings::{Secret, resolve_database};
use crate::store::connect::{self, Facts};
use crate::store::migrate::{self, Origin, Report};
use crate::store::quarantine::Quarantined;
use crate::store::{Fault, Store, StoreOptions};

/// Counts stop at this number.
const BOUND: i64 = 1000;
/// A transaction older than this is noted: the dead rows that it keeps slow claims down. It may be a backup.
const SNAPSHOT_KNOWN: Duration = Duration::from_secs(60);
/// A transaction older than this counts as forgotten, and as wrong.
const SNAPSHOT_WRONG: Duration = Duration::from_secs(600);

/// Flags of the doctor.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Database to look at
    #[arg(long, env = "ABSURD_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<Secret>,
    /// How to print
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// A fault to mend, or a fact to know.
struct Finding {
    /// Whether this is a fault; otherwise it is a fact to know.
    wrong: bool,
    what: String,
    mend: String,
}

impl Finding {
    fn wrong(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { wrong: true, what: what.into(), mend: mend.into() }
    }

    fn note(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { wrong: false, what: what.into(), mend: mend.into() }
    }
}

/// Checks the database, prints the findings, and fails if one of them is a fault.
pub(super) async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let database = resolve_database(args.database_url.as_ref())?;
    let known = connect::check(&database, &connect::connect(&database, "absurd doctor").await?).await?;
    let report = migrate::check(&database, migrate::Options::default()).await?;
    let options = StoreOptions { database, connections_max: 2, wait_max: Duration::from_secs(10), test_clock: false };
    let store = Store::new(options)?;
    let mut findings = contract(&report);
    findings.extend(encoding(&known));
    let told = |fault: Fault| anyhow::anyhow!("cannot look at the database: {fault}");
    let facts = store.doctor_database().await.map_err(told)?;
    let version = facts.first().map_or_else(String::new, |row| row.get("version"));
    findings.extend(facts.iter().flat_map(settings));
    findings.extend(snapshot(store.snapshot_age().await.map_err(told)?));
    // The other checks read tables that a migration creates.
    let upkeep = if report.applied.is_empty() { store.doctor_upkeep().await.map_err(told)? } else { Vec::new() };
    if report.applied.is_empty() {
        findings.extend(store.doctor_registry().await.map_err(told)?.iter().map(registry));
        let names: Vec<&str> = upkeep.iter().map(|row| row.get("queue_name")).collect();
        if report.doorbell {
            for queue in store.doorbell_missing(&names).await.map_err(told)? {
                findings.push(Finding::note(
                    format!("queue {queue:?} has no doorbell yet; a running server hangs it within 15 s"),
                    "absurd migrate",
                ));
            }
        }
        findings.extend(store.doctor_access().await.map_err(told)?.iter().flat_map(|row| access(row, &known.role)));
        findings.extend(store.doctor_indexes().await.map_err(told)?.iter().filter_map(|row| index(row, report.origin)));
        findings.extend(queues(&store, &names).await?);
        findings.extend(upkeep.iter().filter_map(problem));
        findings.extend(store.quarantine_list(BOUND).await.map_err(told)?.iter().map(set_aside));
    }
    store.close();
    print(args.output, &version, &report, &upkeep, &findings);
    let wrong = findings.iter().filter(|finding| finding.wrong).count();
    anyhow::ensure!(wrong == 0, "{wrong} things to mend");
    Ok(())
}

fn contract(report: &Report) -> Vec<Finding> {
    let pending = (!report.applied.is_empty())
        .then(|| Finding::wrong(format!("not applied yet: {}", report.applied.join(", ")), "absurd migrate"));
    pending.into_iter().collect()
}

fn settings(row: &Row) -> Vec<Finding> {
    let mut findings = Vec::new();
    let off = |name: &str| row.get::<_, &str>(name) == "off";
    if off("fsync") {
        findings.push(Finding::wrong(
            "fsync is off: what was acknowledged may be lost with the machine",
            "alter system set fsync = on; select pg_reload_conf()",
        ));
    }
    if off("synchronous_commit") {
        findings.push(Finding::wrong(
            "synchronous_commit is off: the last commits may be lost in a crash",
            "alter system set synchronous_commit = on; select pg_reload_conf()",
        ));
    }
    if off("autovacuum") {
        findings.push(Finding::wrong(
            "autovacuum is off: claims get slower with every task",
            "alter system set autovacuum = on; select pg_reload_conf()",
        ));
    }
    if let Some(now) = row.get::<_, Option<&str>>("fake_now") {
        findings.push(Finding::wrong(
            format!("absurd.fake_now is {now}: the clock stands still"),
            "alter database ... reset absurd.fake_now",
        ));
    }
    if row.get("standby") {
        findings.push(Finding::wrong("this is a standby: nothing can be written", "name the primary"));
    }
    findings
}

fn encoding(known: &Facts) -> Option<Finding> {
    let mend = "make a database with encoding 'UTF8' template template0, and move the queues there";
    known.encoding_problem().map(|problem| Finding::wrong(problem, mend))
}

/// Faults of a queue's table that stop the server or may refuse single rows.
fn access(row: &Row, role: &str) -> Vec<Finding> {
    let queue: &str = row.get("queue_name");
    let kind: &str = row.get("kind");
    let table = format!("absurd.\"{kind}_{}\"", queue.replace('"', "\"\""));
    let mut findings = Vec::new();
    if row.get("missing") && kind != "t" {
        findings.push(Finding::wrong(
            format!("queue {queue:?} has no table {table}"),
            format!("select absurd.create_queue('{}')", queue.replace('\'', "''")),
        ));
    }
    let lost: Vec<String> = row.get("lost");
    if !lost.is_empty() {
        findings.push(Finding::wrong(
            format!("queue {queue:?}: {table} lacks {}: the queue stands still", lost.join(", ")),
            format!("alter table {table} rename column NEW to {}  -- if it was renamed", lost[0]),
        ));
    }
    let lacks: Vec<String> = row.get("lacks");
    if !lacks.is_empty() {
        findings.push(Finding::wrong(
            format!("queue {queue:?}: role {role:?} may not {} {table}: the queue stands still", lacks.join(", ")),
            format!("grant {} on {table} to \"{role}\"", lacks.join(", ")),
        ));
    }
    if row.get("row_security") {
        findings.push(Finding::wrong(
            format!("queue {queue:?}: row security hides or refuses rows of {table} from role {role:?}"),
            format!("alter table {table} disable row level security  -- or: alter role \"{role}\" bypassrls"),
        ));
    }
    let triggers: Vec<String> = row.get("triggers");
    if !triggers.is_empty() {
        findings.push(Finding::note(
            format!("queue {queue:?}: {table} has triggers of others, which may refuse rows: {}", triggers.join(", ")),
            format!("drop trigger {} on {table}  -- if it refuses what it should not", triggers[0]),
        ));
    }
    findings
}

/// A missing key or index. Cleanup alone uses three of the indexes; upstream's tool does not create these.
fn index(row: &Row, origin: Origin) -> Option<Finding> {
    let queue: &str = row.get("queue_name");
    let kind: &str = row.get("kind");
    let columns: &str = row.get("columns");
    let quoted = |suffix: &str| format!("\"{kind}_{}{suffix}\"", queue.replace('"', "\"\""));
    let table = format!("absurd.{}", quoted(""));
    let Some(suffix) = row.get::<_, Option<&str>>("suffix") else {
        return Some(Finding::wrong(
            format!(
                "queue {queue:?}: {table} has no valid key ({columns}): rows may double, and every call reads the table"
            ),
            format!("alter table {table} add primary key ({columns})"),
        ));
    };
    let condition = row.get::<_, Option<&str>>("condition").map(|text| format!(" where {text}")).unwrap_or_default();
    let name = quoted(&format!("_{suffix}"));
    let mend =
        format!("create index {name} on {table} ({columns}){condition}  -- drop index absurd.{name} if it is invalid");
    let what = format!("queue {queue:?}: {table} has no valid index ({columns}){condition}");
    match suffix {
        "coi" | "fai" | "cai" if origin == Origin::Adopted => None,
        "coi" | "fai" | "cai" => Some(Finding::note(format!("{what}: its cleanup reads the whole table"), mend)),
        _ => Some(Finding::wrong(format!("{what}: calls read the whole table"), mend)),
    }
}

fn snapshot(age: Duration) -> Option<Finding> {
    (age > SNAPSHOT_KNOWN).then(|| Finding {
        wrong: age > SNAPSHOT_WRONG,
        what: format!(
            "a transaction has been open for {} s: dead rows cannot be removed, claims get slower",
            age.as_secs()
        ),
        mend: "end it; these may be it: select pid, usename, xact_start, query from pg_stat_activity where backend_xmin is \
               not null order by xact_start; select gid, prepared from pg_prepared_xacts order by prepared"
            .into(),
    })
}

fn registry(row: &Row) -> Finding {
    let queue: &str = row.get("queue_name");
    let literal = queue.replace('\'', "''");
    if row.get("no_tables") {
        Finding::wrong(
            format!("queue {queue:?} is registered, but has no tables"),
            format!("select absurd.create_queue('{literal}')  -- or: select absurd.drop_queue('{literal}')"),
        )
    } else {
        Finding::note(
            format!("queue {queue:?} has tables, but is not registered: it works, and is in no list and no upkeep"),
            format!("select absurd.create_queue('{literal}')"),
        )
    }
}

fn problem(row: &Row) -> Option<Finding> {
    let problem: &str = row.get::<_, Option<&str>>("problem")?;
    let queue: &str = row.get("queue_name");
    Some(Finding::wrong(
        format!("the last upkeep of queue {queue:?} could not do everything: {problem}"),
        "see the text",
    ))
}

fn set_aside(task: &Quarantined) -> Finding {
    let Quarantined { queue, task_id, problem, times, .. } = task;
    let (what, mend) = match task.reason.as_str() {
        "claim" => (
            "Postgres refuses to have it claimed, or what is stored of it cannot be read",
            format!(
                "mend what refuses it, or its row, or: absurd task cancel {task_id}; it is tried again within 10 minutes"
            ),
        ),
        "lease" => (
            "its lease ran out, and Postgres refuses to fail its run",
            "mend what refuses it, such as a trigger or a constraint; it is tried again within 10 minutes".to_owned(),
        ),
        "policy" => (
            "its policy cancels it, and Postgres refuses that",
            "mend what refuses it, such as a trigger or a constraint; it is tried again within 10 minutes".to_owned(),
        ),
        _ => (
            "it fits into no message of the streams that asked for it",
            format!(
                "start a worker whose stream takes larger messages (max_message_bytes), or: absurd task cancel {task_id}"
            ),
        ),
    };
    Finding::wrong(
        format!("queue {queue:?}: task {task_id} is set aside: {what} ({problem}; tried {times} times)"),
        mend,
    )
}

async fn queues(store: &Store, names: &[&str]) -> anyhow::Result<Vec<Finding>> {
    let bar = ProgressBar::new(names.len() as u64);
    let mut findings = Vec::new();
    for queue in names {
        bar.set_message((*queue).to_owned());
        if let Ok(name) = QueueName::parse("queue", queue) {
            match store.doctor_queue(&Caller::anonymous().scope(name), BOUND).await {
                Ok(rows) => findings.extend(rows.iter().flat_map(|row| contents(queue, row))),
                Err(Fault::Missing) => {}
                Err(fault) => {
                    findings.push(Finding::wrong(format!("cannot look at queue {queue:?}: {fault}"), "see the text"));
                }
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(findings)
}

/// The findings from the counts of a queue, each with the way to mend it.
fn contents(queue: &str, row: &Row) -> Vec<Finding> {
    let table = |kind: &str| format!("absurd.\"{kind}_{}\"", queue.replace('"', "\"\""));
    let (t, r, c, w, e) = (table("t"), table("r"), table("c"), table("w"), table("e"));
    let live = "('pending', 'running', 'sleeping')";
    let checks: [(&str, bool, &str, String); 8] = [
        (
            "orphan_checkpoints",
            true,
            "checkpoints belong to no task, and no cleanup finds them",
            format!("delete from {c} c where not exists (select from {t} t where t.task_id = c.task_id)"),
        ),
        (
            "orphan_runs",
            true,
            "runs belong to no task: they are never claimed and never cleaned up",
            format!("delete from {r} r where not exists (select from {t} t where t.task_id = r.task_id)"),
        ),
        (
            "stale_waits",
            false,
            "waits belong to no sleeping run",
            format!(
                "delete from {w} w where not exists (select from {r} r where r.run_id = w.run_id and r.state = 'sleeping')"
            ),
        ),
        (
            "idle_placeholders",
            false,
            "events were awaited, never emitted, and nobody waits any more; cleanup takes them",
            format!(
                "delete from {e} e where e.payload is null and not exists (select from {w} w where w.event_name = e.event_name)"
            ),
        ),
        (
            "endless_tasks",
            true,
            "tasks have ended, but their last run is gone: no cleanup finds them",
            format!(
                "delete from {t} t where t.state not in {live} and not exists (select from {r} r where r.run_id = t.last_attempt_run)"
            ),
        ),
        (
            "stuck_tasks",
            true,
            "tasks have not ended, but nothing of theirs can run",
            format!(
                "update {t} t set state = 'failed' where t.state in {live} and not exists (select from {r} r \
                 where r.task_id = t.task_id and r.state in {live})  -- then: absurd task retry ID"
            ),
        ),
        (
            "overdue_leases",
            true,
            "leases ran out over a minute ago, and nobody moves their tasks on",
            "absurd serve  # on this database: it does so every two seconds".to_owned(),
        ),
        (
            "in_default_partition",
            false,
            "tasks lie in the default partition: their weeks get no partition before they are cleaned up",
            format!("select absurd.cleanup_all_queues('{}')", queue.replace('\'', "''")),
        ),
    ];
    let found = checks.into_iter().filter_map(|(name, wrong, what, mend)| {
        let count: i64 = row.get(name);
        let many = if count == BOUND { format!("{count} or more") } else { count.to_string() };
        (count > 0).then(|| Finding { wrong, what: format!("queue {queue:?}: {many} {what}"), mend })
    });
    found.collect()
}

fn print(how: Output, version: &str, report: &Report, upkeep: &[Row], findings: &[Finding]) {
    let ran = |row: &Row| row.get::<_, Option<std::time::SystemTime>>("ran_at");
    let count = |row: &Row, name: &str| row.get::<_, Option<i64>>(name).unwrap_or(0);
    if how == Output::Json {
        let rounds: Vec<_> = upkeep
            .iter()
            .map(|row| {
                json!({
                    "queue": row.get::<_, &str>("queue_name"),
                    "ran_at": ran(row).map(|at| humantime::format_rfc3339_millis(at).to_string()),
                    "tasks_deleted": count(row, "tasks_deleted"), "events_deleted": count(row, "events_deleted"),
                    "partitions_dropped": row.get::<_, Option<i32>>("partitions_dropped"),
                    "problem": row.get::<_, Option<&str>>("problem"),
                })
            })
            .collect();
        let found: Vec<_> = findings
            .iter()
            .map(|finding| json!({"wrong": finding.wrong, "what": finding.what, "mend": finding.mend}))
            .collect();
        output::json(&json!({
            "postgres": version, "adopted": report.origin == Origin::Adopted, "doorbell": report.doorbell,
            "upkeep": rounds, "findings": found,
        }));
        return;
    }
    let origin = match report.origin {
        Origin::Ours => "installed by this program",
        Origin::Adopted => "installed by upstream's tool",
    };
    output::record(&[
        ("Postgres", version.to_owned()),
        ("contract", origin.to_owned()),
        ("doorbell", if report.doorbell { "on".into() } else { "off".into() }),
    ]);
    if !upkeep.is_empty() {
        out!("");
        let rows: Vec<Vec<String>> = upkeep
            .iter()
            .map(|row| {
                let when =
                    ran(row).map_or_else(|| "never".into(), |at| humantime::format_rfc3339_seconds(at).to_string());
                let partitions = i64::from(row.get::<_, Option<i32>>("partitions_dropped").unwrap_or(0));
                let counts = [count(row, "tasks_deleted"), count(row, "events_deleted"), partitions];
                let counts = counts.map(|count| count.to_string());
                [vec![row.get("queue_name"), when], counts.to_vec()].concat()
            })
            .collect();
        output::table(&["queue", "last upkeep", "tasks deleted", "events deleted", "partitions dropped"], &rows);
    }
    for finding in findings {
        out!("\n{}: {}\n  {}", if finding.wrong { "wrong" } else { "note" }, finding.what, finding.mend);
    }
    if !findings.iter().any(|finding| finding.wrong) {
        out!("\nnothing to mend");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_transaction_is_told_after_a_minute_and_wrong_after_ten() {
        let told = |seconds| snapshot(Duration::from_secs(seconds)).map(|finding| finding.wrong);
        assert_eq!([told(60), told(61), told(600), told(601)], [None, Some(false), Some(false), Some(true)]);
    }
}
