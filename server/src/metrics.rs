//! The metrics that parts of the server record as they work. `http.rs` samples the rest when they are read.
//!
//! Names follow Prometheus: base units, and `_total` for counters. No label holds an id. Only two metrics have a
//! queue's name as a label. `absurd_queue_trouble` is bounded to 1,000 series; `absurd_hot_retries_total` has one
//! series per queue whose tasks retry without a pause.

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper bounds of the buckets of duration histograms, in seconds.
const SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Installs the recorder, once per process. Servers in one process share it.
pub fn install() {
    HANDLE.get_or_init(|| {
        let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS);
        builder.and_then(PrometheusBuilder::install_recorder).map_err(|error| tracing::warn!(%error, "no metrics")).ok()
    });
}

/// All metrics in Prometheus' text format; None: the recorder is not installed.
pub(crate) fn render() -> Option<String> {
    HANDLE.get().and_then(Option::as_ref).map(PrometheusHandle::render)
}

/// Counts an answered call, and records its duration.
pub fn rpc(method: &'static str, code: &'static str, took: Duration) {
    counter!("absurd_rpcs_total", "method" => method, "code" => code).increment(1);
    histogram!("absurd_rpc_duration_seconds", "method" => method).record(took);
}

/// Counts a refused call, by the reason that the caller sees.
pub fn refused(reason: &'static str) {
    counter!("absurd_refused_total", "reason" => reason).increment(1);
}

/// Counts a connection that the gate cut, by cause.
pub fn connection_cut(why: &'static str) {
    counter!("absurd_connections_cut_total", "why" => why).increment(1);
}

/// Counts a failure to accept a connection. The kind tells which file descriptors ran out, if any.
pub fn accept_failed(error: &io::Error) {
    let kind = match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::MFILE.raw_os_error() => "process_files",
        Some(code) if code == rustix::io::Errno::NFILE.raw_os_error() => "system_files",
        _ => "other",
    };
    counter!("absurd_accept_errors_total", "kind" => kind).increment(1);
}

/// Counts a stream that the server gave up, by cause. A graceful end does not count.
pub fn stream_ended(why: &'static str) {
    counter!("absurd_streams_ended_total", "why" => why).increment(1);
}

/// Counts claimed runs.
pub fn claimed(count: usize) {
    counter!("absurd_claimed_runs_total").increment(count as u64);
}

/// Counts a claim that the server released itself, by cause.
pub fn released(why: &'static str) {
    counter!("absurd_released_claims_total", "why" => why).increment(1);
}

/// Counts a failure of an attempt beyond the fifth that is retried without a pause.
pub fn hot_retry(queue: &str) {
    counter!("absurd_hot_retries_total", "queue" => queue.to_owned()).increment(1);
}

/// Sets the number of quarantined tasks in the whole database, by reason.
pub fn quarantined(reason: &'static str, count: i64) {
    gauge!("absurd_quarantined_tasks", "reason" => reason).set(count as f64);
}

/// Sets the time for which the oldest transaction has kept dead rows from being removed.
pub fn snapshot_age(age: Duration) {
    gauge!("absurd_oldest_transaction_seconds").set(age.as_secs_f64());
}

/// Counts expired leases whose runs a sweep of this replica failed.
pub fn leases_expired(count: usize) {
    counter!("absurd_leases_expired_total").increment(count as u64);
}

/// Counts the items of a batch, and records its duration.
pub fn batch(name: &'static str, items: usize, took: Duration) {
    counter!("absurd_batch_items_total", "batch" => name).increment(items as u64);
    histogram!("absurd_batch_duration_seconds", "batch" => name).record(took);
}

/// Counts a failed statement, by kind of fault. Statements inside an explicit transaction do not count.
pub fn fault(kind: &'static str) {
    counter!("absurd_database_faults_total", "kind" => kind).increment(1);
}

/// Counts a queue whose tables were found locked by another session.
pub fn queue_locked() {
    counter!("absurd_queue_locks_total").increment(1);
}

/// Counts a background task that panicked. It is restarted.
pub fn part_ended(name: &'static str) {
    counter!("absurd_parts_ended_total", "part" => name).increment(1);
}

/// Counts a lost LISTEN connection.
pub fn listener_lost() {
    counter!("absurd_listen_reconnects_total").increment(1);
}
