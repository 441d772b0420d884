//! Sends hints to other replicas, and hears theirs and those of direct SQL writers. Any hint may be lost; the tick
//! makes that a delay, not a loss.

pub mod note;

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use self::note::Note;
use crate::dispatch::Dispatcher;
use crate::domain::QueueName;
use crate::hints::{Hints, Inside};
use crate::jitter::random;
use crate::looks::Looks;
use crate::metrics;
use crate::store::listen::{Heard, listen};
use crate::store::{Fault, Store};

/// Time that hints gather before they are sent together.
const GATHER: Duration = Duration::from_millis(15);
/// Looks after arming, in milliseconds: a spawn that saw no armed row may commit after the first look.
const PROBES: [u64; 5] = [0, 5, 20, 80, 320];

/// Sends hints forever: arms at once; rings and notes gather first, and go out in statements of their own.
pub async fn send(hints: &Hints, store: &Store, looks: &Looks) {
    let mut probes: Vec<(Instant, Vec<QueueName>)> = Vec::new();
    let mut send_at: Option<Instant> = None;
    loop {
        let bell = hints.notified();
        let next = probes.iter().map(|(at, _)| *at).chain(send_at).min();
        match next {
            Some(at) => tokio::select! {
                () = bell => {}
                () = tokio::time::sleep_until(at) => {}
            },
            None => bell.await,
        }
        let arm = hints.take_arm();
        if !arm.is_empty() {
            if hints.doorbell() {
                let names: Vec<&str> = arm.iter().map(QueueName::as_str).collect();
                if let Err(fault) = store.doorbell_arm(&names, hints.replica_id()).await {
                    tracing::debug!(?fault, "could not arm the doorbell");
                }
            }
            let now = Instant::now();
            probes.extend(PROBES.map(|ms| (now + Duration::from_millis(ms), arm.clone())));
        }
        probe(looks, &mut probes).await;
        if !hints.is_waiting() {
            send_at = None;
        } else if send_at.is_some_and(|at| at <= Instant::now()) {
            send_at = None;
            flush(hints, store).await;
        } else if send_at.is_none() {
            send_at = Some(Instant::now() + GATHER);
        }
    }
}

async fn probe(looks: &Looks, probes: &mut Vec<(Instant, Vec<QueueName>)>) {
    let now = Instant::now();
    let mut due: HashSet<QueueName> = HashSet::new();
    probes.retain(|(at, queues)| {
        if *at <= now {
            due.extend(queues.iter().cloned());
        }
        *at > now
    });
    if !due.is_empty() {
        let names: Vec<&str> = due.iter().map(QueueName::as_str).collect();
        if let Err(fault) = looks.at(&names).await {
            tracing::debug!(?fault, "could not look at the queues");
        }
    }
}

async fn flush(hints: &Hints, store: &Store) {
    let Inside { dirty, credit, alive, claims, drained, .. } = hints.take();
    let names: Vec<&str> = dirty.iter().map(QueueName::as_str).collect();
    let mut outcome: Result<(), Fault> = Ok(());
    if !names.is_empty() {
        outcome = store.doorbell_ring(&names, hints.replica_id()).await;
    }
    let drains = drained.into_iter().map(|(queue, session)| Note::Drain(queue, session));
    let notes = Note::left(&credit).chain(Note::alive(&alive)).chain(Note::claims_left(&claims)).chain(drains);
    let messages: Vec<String> = notes.map(|note| note.encode()).collect();
    if !messages.is_empty() {
        outcome = outcome.and(store.credit_notify(&messages).await);
    }
    if let Err(fault) = outcome {
        tracing::debug!(?fault, "could not send hints to other replicas");
    }
}

/// Listens forever. After each LISTEN it disarms this replica's doorbells, then looks at all queues and arms them
/// again, because notifications may have been lost.
pub async fn hear(hints: &Hints, store: &Store, database: &tokio_postgres::Config, dispatcher: &Dispatcher) {
    let mut pause = Duration::from_millis(100);
    loop {
        match listen(database).await {
            Ok((client, mut heard)) => {
                hints.note_listening(true);
                if let Err(fault) = store.doorbell_disarm(hints.replica_id()).await {
                    tracing::debug!(?fault, "could not disarm the doorbell");
                }
                dispatcher.note_unheard();
                pause = Duration::from_millis(100);
                while let Some(said) = heard.recv().await {
                    match said {
                        Heard::Payload(payload) => act(&payload, dispatcher),
                        Heard::Lost(error) => {
                            metrics::listener_lost();
                            tracing::warn!(
                                error,
                                "lost the LISTEN connection; tasks are found by the tick until it is back"
                            );
                        }
                    }
                }
                drop(client);
                hints.note_listening(false);
            }
            Err(fault) => tracing::warn!(?fault, "could not listen; will try again"),
        }
        tokio::time::sleep(pause.mul_f64(0.5 + random())).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Carries out a notification; one that does not parse is ignored.
fn act(payload: &str, dispatcher: &Dispatcher) {
    match Note::parse(payload) {
        Some(Note::Rung(queue)) => dispatcher.note_rung(&queue),
        Some(Note::Drain(queue, session)) => {
            dispatcher.drain(&queue, &session);
        }
        Some(Note::Left(runs)) => dispatcher.left_elsewhere(&runs),
        Some(Note::Alive(runs)) => dispatcher.alive_elsewhere(&runs),
        Some(Note::ClaimsLeft(claims)) => dispatcher.claims_left_elsewhere(&claims),
        None => {}
    }
}
