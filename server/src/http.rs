//! The HTTP listener: metrics and probes.
//!
//! A read of `/metrics` first samples the state of the server that no part records as it works.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics::gauge;
use tokio::net::TcpListener;

use crate::engine::Engine;
use crate::gate::Gate;
use crate::metrics::render;

/// Upper bound of series of `absurd_queue_trouble`, one per queue and kind of trouble.
const TROUBLES_MAX: usize = 1000;
/// Queues and kinds of trouble seen so far, and whether the trouble persists.
static TROUBLES: Mutex<BTreeMap<(String, &'static str), bool>> = Mutex::new(BTreeMap::new());

/// Sets a gauge per queue and kind of trouble, so that an alert can name the queue: 1 while the trouble lasts, then 0.
fn observe_queues(engine: &Engine) {
    let mut named = TROUBLES.lock().unwrap_or_else(PoisonError::into_inner);
    named.values_mut().for_each(|lasts| *lasts = false);
    let locked = engine.store.locked_queues().into_iter().map(|queue| (queue, "locked"));
    let troubled = engine.looks.troubles().into_iter().map(|(queue, kind)| (queue, kind.as_str()));
    for trouble in locked.chain(troubled) {
        if named.len() < TROUBLES_MAX || named.contains_key(&trouble) {
            named.insert(trouble, true);
        }
    }
    for ((queue, kind), lasts) in named.iter() {
        let gauge = gauge!("absurd_queue_trouble", "queue" => queue.clone(), "kind" => *kind);
        gauge.set(f64::from(u8::from(*lasts)));
    }
}

/// Sets the gauges that are sampled when metrics are read.
fn observe(engine: &Engine, gate: &Gate) {
    for (role, most, open, waiting) in engine.store.connections() {
        gauge!("absurd_database_connections_max", "role" => role).set(most as f64);
        gauge!("absurd_database_connections", "role" => role).set(open as f64);
        gauge!("absurd_database_waiting", "role" => role).set(waiting as f64);
    }
    gauge!("absurd_connections").set(gate.connections() as f64);
    gauge!("absurd_streams").set(engine.dispatcher.streams() as f64);
    gauge!("absurd_writes_waiting").set(engine.waiting() as f64);
    observe_queues(engine);
    gauge!("absurd_listening").set(f64::from(u8::from(engine.hints.listening())));
    let age = engine.store.clock_age().map_or(f64::INFINITY, |age| age.as_secs_f64());
    gauge!("absurd_database_silence_seconds").set(age);
}

/// Serves `/metrics`, `/livez` and `/readyz` over plain HTTP, until the task is dropped.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<Engine>,
    gate: Arc<Gate>,
    ready: Arc<dyn Fn() -> bool + Send + Sync>,
) {
    let scrape = move || {
        observe(&engine, &gate);
        std::future::ready(render().ok_or(StatusCode::SERVICE_UNAVAILABLE))
    };
    let is_ready = move || std::future::ready(if ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE });
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/livez", get(|| std::future::ready(StatusCode::OK)))
        .route("/readyz", get(is_ready));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::warn!(%error, "metrics are served no more");
    }
}
