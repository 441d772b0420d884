//! A worker process of the load, on the Rust client: carries out tasks and writes down what it does and hears.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use absurd_client::{AbsurdClient, Awaited, ClaimedTask, ConnectOptions, Error, Json, Slept, StreamOptions};
use serde_json::json;

use crate::history::{Call, History, Line, Op, Who, now};
use crate::shape::{QUEUE, Shape};

/// Command line of a worker.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub who: Who,
    /// Tasks at the same time
    #[arg(long, default_value_t = 8)]
    pub in_flight: i32,
    /// Lease of a claim in seconds
    #[arg(long, default_value_t = 10)]
    pub lease: u64,
}

struct Worker {
    name: String,
    history: History,
    values: AtomicU64,
}

/// Works until it is told to stop by SIGTERM.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let worker = Arc::new(Worker {
        history: History::create(&options.who.history)?,
        name: options.who.name.clone(),
        values: AtomicU64::new(0),
    });
    let client = AbsurdClient::connect(&ConnectOptions::new(options.who.urls))?
        .with_queue(QUEUE)
        .with_worker_id(options.who.name);
    let how = StreamOptions {
        max_in_flight: options.in_flight,
        claim_timeout: Duration::from_secs(options.lease),
        reconnect_grace: Some(Duration::from_secs(5)),
        ..StreamOptions::default()
    };
    let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut stream = loop {
        match client.claim_stream(how.clone()).await {
            Ok(stream) => break stream,
            Err(error) if error.is_passing() => eprintln!("{}: {error}", worker.name),
            Err(error) => return Err(error.into()),
        }
    };
    loop {
        tokio::select! {
            task = stream.next() => {
                let Some(task) = task else { break };
                tokio::spawn({
                    let worker = Arc::clone(&worker);
                    async move { worker.carry_out(task).await }
                });
            }
            _ = stop.recv() => break,
        }
    }
    stream.close(Duration::from_secs(5)).await?;
    Ok(())
}

fn text(json: Option<&Json>) -> String {
    json.and_then(|json| json.to::<serde_json::Value>().ok())
        .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        .unwrap_or_default()
}

impl Worker {
    async fn carry_out(&self, task: ClaimedTask) {
        let shape = task.params::<Shape>().ok();
        let event = shape.as_ref().and_then(|shape| shape.event.clone());
        self.history.write(&Line::Delivered {
            t: now(),
            stream: 0,
            task: task.task_id,
            run: task.run_id,
            token: task.claim_token().to_owned(),
            attempt: task.attempt,
            params: text(task.params.as_ref()),
            steps: task.checkpoints.iter().map(|(name, value)| (name.clone(), text(value.as_ref()))).collect(),
            complete: task.checkpoints_complete,
            woken: event.zip(task.event_payload.as_ref().map(|payload| text(Some(payload)))),
        });
        let Some(shape) = shape else {
            eprintln!("{}: params of {} are no shape", self.name, task.task_id);
            return;
        };
        // Whatever goes wrong: the task is dropped, and its lease runs out.
        let _ = self.attempt(&task, &shape).await;
    }

    /// One attempt; None when it is over before its end.
    async fn attempt(&self, task: &ClaimedTask, shape: &Shape) -> Option<()> {
        for step in 0..shape.steps {
            let name = format!("s{step}");
            if task.checkpoint(&name).is_none() {
                tokio::time::sleep(Duration::from_millis(shape.work)).await;
                let value = self.value();
                self.call(Op::Step, task, Some(name.clone()), Some(value.clone()), task.set_checkpoint(&name, &value))
                    .await?;
            }
            if step == 0 && shape.nap > 0 {
                let nap = task.sleep("nap", Duration::from_millis(shape.nap));
                if let Slept::Suspended { .. } = self.call(Op::Sleep, task, Some("nap".into()), None, nap).await? {
                    return None;
                }
            }
        }
        if task.attempt <= shape.fails {
            let reason = self.value();
            let why = json!({"name": "Planned", "message": reason});
            self.call(Op::Fail, task, None, Some(reason), task.fail(&why)).await?;
            return None;
        }
        if let Some(event) = &shape.event {
            let call = self.begin(Op::Await, task, Some(event.clone()), None);
            match task.await_event("wait", event, None).await {
                Ok(Awaited::Payload(payload)) => self.history.ok(call, Some(text(Some(&payload))), None),
                Ok(Awaited::Suspended { .. } | Awaited::TimedOut) => {
                    self.history.ok(call, None, None);
                    return None;
                }
                Err(error) => {
                    self.history.failed(call, &error);
                    return None;
                }
            }
        }
        let value = self.value();
        self.call(Op::Complete, task, None, Some(value.clone()), task.complete(&value)).await
    }

    fn value(&self) -> String {
        format!("{}-{}-{}", self.name, std::process::id(), self.values.fetch_add(1, Ordering::Relaxed))
    }

    fn begin(&self, op: Op, task: &ClaimedTask, name: Option<String>, value: Option<String>) -> u64 {
        let call = Call {
            task: Some(task.task_id),
            run: Some(task.run_id),
            token: Some(task.claim_token().to_owned()),
            name,
            value,
            max_attempts: None,
        };
        self.history.begin(op, call)
    }

    async fn call<T>(
        &self,
        op: Op,
        task: &ClaimedTask,
        name: Option<String>,
        value: Option<String>,
        calling: impl Future<Output = Result<T, Error>>,
    ) -> Option<T> {
        let call = self.begin(op, task, name, value);
        match calling.await {
            Ok(answer) => {
                self.history.ok(call, None, None);
                Some(answer)
            }
            Err(error) => {
                self.history.failed(call, &error);
                None
            }
        }
    }
}
