//! `absurd bench overload`: throughput of a server that is asked for more than it can do, and the time of its refusals.
//!
//! First, callers that wait for each answer show the server's limit. Then calls come at a multiple of that rate,
//! whether answers come or not; no caller retries. Spawn several tasks per call: a call must cost the server more than
//! its caller, which shares the machine. Otherwise the caller is measured.

use std::time::{Duration, Instant};

use absurd_client::proto as pb;
use absurd_client::proto::absurd_service_client::AbsurdServiceClient;
use clap::Args;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::report::{Report, Times};
use super::{Stage, StageArgs};
use crate::settings::Span;

const QUEUE: &str = "absurd-bench";
/// Number of connections that share the calls.
const CONNECTIONS: usize = 8;

/// Flags of the measurement.
#[derive(Debug, Args)]
pub(in crate::cli) struct OverloadArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// How long each half takes
    #[arg(long, default_value = "20s", value_name = "SPAN")]
    time: Span,
    /// Callers that show what the server can do
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    in_flight: u32,
    /// Tasks that one call spawns; with few of them the caller, on the same machine, is what is measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    batch: u32,
    /// How much more is asked for than can be done
    #[arg(long, default_value_t = 2.0)]
    factor: f64,
    /// Deadline of each call
    #[arg(long, default_value = "5s", value_name = "SPAN")]
    deadline: Span,
}

type Grpc = AbsurdServiceClient<Channel>;

/// Outcome of a call.
#[derive(Debug)]
enum Became {
    Done(Duration),
    Refused(Duration),
    Late,
}

/// Outcomes of all calls.
#[derive(Debug, Default)]
struct All {
    /// Successful calls; in the second part, only those that were answered before its end.
    done: u32,
    late: u32,
    answers: Times,
    refusals: Times,
    refused: u32,
}

impl All {
    fn note(&mut self, became: Became, counts: bool) {
        match became {
            Became::Done(took) => {
                self.done += u32::from(counts);
                self.answers.note(took);
            }
            Became::Refused(took) => {
                self.refused += 1;
                self.refusals.note(took);
            }
            Became::Late => self.late += 1,
        }
    }
}

async fn call(mut grpc: Grpc, batch: u32, deadline: Duration) -> anyhow::Result<Became> {
    let task = pb::NewTask { task_name: "bench".into(), ..Default::default() };
    let began = Instant::now();
    let answer = if batch == 1 {
        let mut request = tonic::Request::new(pb::SpawnTaskRequest { queue: QUEUE.into(), task: Some(task) });
        request.set_timeout(deadline);
        grpc.spawn_task(request).await.map(drop)
    } else {
        let tasks = vec![task; batch as usize];
        let mut request = tonic::Request::new(pb::SpawnTasksRequest { queue: QUEUE.into(), tasks });
        request.set_timeout(deadline);
        grpc.spawn_tasks(request).await.map(drop)
    };
    match answer {
        Ok(()) => Ok(Became::Done(began.elapsed())),
        Err(status) => match status.code() {
            Code::ResourceExhausted | Code::Unavailable => Ok(Became::Refused(began.elapsed())),
            Code::DeadlineExceeded | Code::Cancelled => Ok(Became::Late),
            _ => Err(status.into()),
        },
    }
}

/// Measures, prints, and drops the queue that it used.
pub(super) async fn run(args: &OverloadArgs, stage: &Stage) -> anyhow::Result<()> {
    anyhow::ensure!(args.factor > 0.0 && args.factor <= 100.0, "--factor must be more than 0, and at most 100");
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = Endpoint::from_shared(stage.url.clone())?.tcp_nodelay(true).connect().await?;
        connections.push(AbsurdServiceClient::new(channel));
    }
    let created = pb::CreateQueueRequest { queue: QUEUE.into(), ..Default::default() };
    anyhow::ensure!(
        connections[0].create_queue(created).await?.into_inner().created,
        "queue {QUEUE} exists, maybe from a bench that was stopped; drop it: absurd queue drop --queue {QUEUE} --yes"
    );
    let outcome = measure(args, &connections).await;
    connections[0].drop_queue(pb::DropQueueRequest { queue: QUEUE.into() }).await?;
    outcome?.print(args.stage.output);
    Ok(())
}

async fn measure(args: &OverloadArgs, connections: &[Grpc]) -> anyhow::Result<Report> {
    let peak = closed(args, connections).await?;
    let calls_per_s = f64::from(peak.done) / args.time.0.as_secs_f64();
    let over = open(args, connections, calls_per_s * args.factor).await?;
    let tasks = |calls: u32| f64::from(calls * args.batch) / args.time.0.as_secs_f64();
    Ok(Report::new("overload")
        .rate("tasks_per_s", tasks(peak.done))
        .rate("asked_for_tasks_per_s", tasks(peak.done) * args.factor)
        .rate("tasks_per_s_then", tasks(over.done))
        .rate("kept", f64::from(over.done) / f64::from(peak.done.max(1)))
        .rate("refused_calls", f64::from(over.refused))
        .rate("late_calls", f64::from(over.late))
        .times("answer", peak.answers)
        .times("answer then", over.answers)
        .times("refusal", over.refusals))
}

/// Runs callers that wait for each answer before they call again.
async fn closed(args: &OverloadArgs, connections: &[Grpc]) -> anyhow::Result<All> {
    let until = Instant::now() + args.time.0;
    let mut callers: JoinSet<anyhow::Result<Vec<Became>>> = JoinSet::new();
    for caller in 0..args.in_flight as usize {
        let (grpc, batch, deadline) = (connections[caller % CONNECTIONS].clone(), args.batch, args.deadline.0);
        callers.spawn(async move {
            let mut heard = Vec::new();
            while Instant::now() < until {
                heard.push(call(grpc.clone(), batch, deadline).await?);
            }
            Ok(heard)
        });
    }
    let mut all = All::default();
    while let Some(heard) = callers.join_next().await {
        heard??.into_iter().for_each(|became| all.note(became, true));
    }
    Ok(all)
}

/// Sends calls at a fixed rate, whether answers come or not.
async fn open(args: &OverloadArgs, connections: &[Grpc], rate: f64) -> anyhow::Result<All> {
    let (began, until) = (Instant::now(), Instant::now() + args.time.0);
    let mut calls: JoinSet<anyhow::Result<(Became, Instant)>> = JoinSet::new();
    let mut all = All::default();
    let mut turn = connections.iter().cycle();
    let mut sent = 0.0;
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    while Instant::now() < until {
        ticks.tick().await;
        let due = began.elapsed().as_secs_f64() * rate;
        while sent < due {
            let Some(grpc) = turn.next().cloned() else { break };
            let (batch, deadline) = (args.batch, args.deadline.0);
            calls.spawn(async move { Ok((call(grpc, batch, deadline).await?, Instant::now())) });
            sent += 1.0;
        }
        while let Some(done) = calls.try_join_next() {
            let (became, at) = done??;
            all.note(became, at <= until);
        }
    }
    while let Some(done) = calls.join_next().await {
        let (became, at) = done??;
        all.note(became, at <= until);
    }
    Ok(all)
}
