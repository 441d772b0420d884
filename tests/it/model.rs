//! Random operations against a small model of the contract and against a server, compared step by step.
//!
//! A seed decides all choices; `ABSURD_TEST_SEED` repeats one, and seeds that once failed are kept below.

use std::collections::BTreeMap;
use std::time::Duration;

use absurd_client::{
    AbsurdClient, Awaited, CancelOutcome, ClaimOptions, ClaimedTask, RetryOptions, SpawnOptions, State,
};
use absurd_tests::{Server, in_time};
use serde_json::json as j;
use uuid::Uuid;

/// Seeds that have found something.
const KEPT: &[u64] = &[3_622_315_247];
/// Seeds of a run beside those.
const SEEDS: u64 = 12;
/// Operations of a seed.
const STEPS: usize = 120;
const EVENTS: [&str; 3] = ["a", "b", "c"];

/// A run, as the contract has it.
#[derive(Debug, Clone)]
struct Run {
    id: Uuid,
    attempt: i32,
    state: State,
    /// Where it stands among those that can be claimed.
    place: u64,
    /// The claim that holds it, or ended it.
    holder: Option<usize>,
    waits_for: Option<&'static str>,
}

#[derive(Debug, Clone)]
struct Task {
    id: Uuid,
    max_attempts: i32,
    runs: Vec<Run>,
    steps: BTreeMap<String, i64>,
}

impl Task {
    fn run(&mut self) -> &mut Run {
        self.runs.last_mut().unwrap()
    }

    fn state(&self) -> State {
        self.runs.last().unwrap().state
    }
}

#[derive(Debug, Default)]
struct Model {
    tasks: Vec<Task>,
    events: BTreeMap<&'static str, i64>,
    /// Which task and run each claim was for.
    claims: Vec<(usize, Uuid)>,
    places: u64,
}

impl Model {
    fn place(&mut self) -> u64 {
        self.places += 1;
        self.places
    }

    /// Places of the runs that a claim takes, in order. Which of several in one place comes first is left open.
    fn claimable(&self, count: usize) -> Vec<u64> {
        let pending = self.tasks.iter().filter(|task| task.state() == State::Pending);
        let mut places: Vec<u64> = pending.map(|task| task.runs.last().unwrap().place).collect();
        places.sort_unstable();
        places.truncate(count);
        places
    }

    /// The task whose run can be claimed, by the run.
    fn pending(&self, run_id: Uuid) -> usize {
        let is_it = |task: &Task| task.state() == State::Pending && task.runs.last().unwrap().id == run_id;
        self.tasks.iter().position(is_it).expect("only what can be claimed is claimed")
    }

    /// Why a claim may not write, if it may not. Waits look at the state alone once the run has ended.
    fn refusal(&self, claim: usize, waits: bool) -> Option<&'static str> {
        let (task, run_id) = self.claims[claim];
        let run = self.tasks[task].runs.iter().find(|run| run.id == run_id).unwrap();
        let mine = run.holder == Some(claim);
        match run.state {
            // A wait looks at its task first.
            _ if waits && self.tasks[task].state() == State::Cancelled => Some("TASK_CANCELLED"),
            State::Running if mine => None,
            State::Cancelled => Some("TASK_CANCELLED"),
            State::Completed | State::Failed if mine || waits => Some("RUN_NOT_RUNNING"),
            _ => Some("CLAIM_LOST"),
        }
    }
}

struct Story {
    model: Model,
    client: AbsurdClient,
    claims: Vec<ClaimedTask>,
    random: fastrand::Rng,
    log: Vec<String>,
}

impl Story {
    fn below(&mut self, bound: usize) -> usize {
        self.random.usize(0..bound)
    }

    fn some_task(&mut self) -> Option<usize> {
        let count = self.model.tasks.len();
        (count > 0).then(|| self.below(count))
    }

    async fn step(&mut self) {
        match self.below(20) {
            0..5 => self.spawn().await,
            5..9 => self.claim().await,
            9..16 => self.write().await,
            16 => self.cancel().await,
            17 => self.retry().await,
            18 => self.emit().await,
            _ => self.look().await,
        }
    }

    async fn spawn(&mut self) {
        let max_attempts = i32::try_from(1 + self.below(3)).unwrap();
        self.log.push(format!("spawn, at most {max_attempts}"));
        let options = SpawnOptions::default().max_attempts(max_attempts);
        let spawned = self.client.spawn_task("n", &j!(1), options).await.unwrap();
        assert!(spawned.created);
        let place = self.model.place();
        let run = Run { id: spawned.run_id, attempt: 1, state: State::Pending, place, holder: None, waits_for: None };
        self.model.tasks.push(Task { id: spawned.task_id, max_attempts, runs: vec![run], steps: BTreeMap::new() });
    }

    async fn claim(&mut self) {
        let count = 1 + self.below(3);
        self.log.push(format!("claim {count}"));
        let expected = self.model.claimable(count);
        let options = ClaimOptions { qty: i32::try_from(count).unwrap(), ..ClaimOptions::default() };
        let claimed = self.client.claim_task(options).await.unwrap();
        let indexes: Vec<usize> = claimed.iter().map(|task| self.model.pending(task.run_id)).collect();
        let places: Vec<u64> = indexes.iter().map(|index| self.model.tasks[*index].run().place).collect();
        assert_eq!(places, expected);
        for (index, task) in indexes.into_iter().zip(claimed) {
            assert_eq!(task.attempt, self.model.tasks[index].run().attempt);
            let known: BTreeMap<String, i64> = task
                .checkpoints
                .iter()
                .filter(|(name, _)| name.starts_with('s'))
                .map(|(name, value)| (name.clone(), value.as_ref().unwrap().to().unwrap()))
                .collect();
            assert_eq!(known, self.model.tasks[index].steps, "steps of {}", task.task_id);
            let claim = self.claims.len();
            let run = self.model.tasks[index].run();
            (run.state, run.holder, run.waits_for) = (State::Running, Some(claim), None);
            self.model.claims.push((index, task.run_id));
            self.claims.push(task);
        }
    }

    /// A write under any claim that there ever was.
    async fn write(&mut self) {
        if self.claims.is_empty() {
            return;
        }
        let back = self.below(self.claims.len().min(6));
        let claim = self.claims.len() - 1 - back;
        let what = self.below(6);
        let (index, run_id) = self.model.claims[claim];
        let refusal = self.model.refusal(claim, what == 5);
        self.log.push(format!("write {what} under claim {claim} of task {index}: {refusal:?}"));
        let value = i64::try_from(self.log.len()).unwrap();
        let event = EVENTS[self.below(EVENTS.len())];
        let step = format!("s{}", self.below(3));
        let task = &self.claims[claim];
        let outcome = match what {
            0 | 1 => task.set_checkpoint(&step, &value).await,
            2 => task.complete(&value).await,
            3 => task.fail(&j!({"message": value})).await.map(drop),
            4 => task.release(Duration::ZERO).await,
            _ => {
                let awaited = task.await_event(&format!("wait-{event}"), event, None).await;
                if refusal.is_none() {
                    let payload = self.model.events.get(event);
                    match awaited.as_ref().unwrap() {
                        Awaited::Payload(json) => assert_eq!(Some(&json.to::<i64>().unwrap()), payload),
                        other => assert!(payload.is_none() && matches!(other, Awaited::Suspended { .. }), "{other:?}"),
                    }
                }
                awaited.map(drop)
            }
        };
        // Whoever ended a run is told so again; whoever gave it back too, until somebody else has it.
        let run = self.model.tasks[index].runs.iter().find(|run| run.id == run_id).unwrap().clone();
        let again = run.holder == Some(claim)
            && (what == 2 && run.state == State::Completed || what == 3 && run.state == State::Failed);
        let unclaimed = matches!(run.state, State::Pending | State::Sleeping);
        match refusal {
            None => outcome.unwrap(),
            Some(_) if again => return outcome.unwrap(),
            // Repetitions of what gave the claim up have answers of their own: rpcs.rs has them.
            Some(_) if unclaimed && matches!(what, 4 | 5) => return,
            Some(reason) => {
                assert_eq!(outcome.unwrap_err().reason().as_str(), reason);
                return;
            }
        }
        let place = self.model.place();
        let waits = !self.model.events.contains_key(event);
        let task = &mut self.model.tasks[index];
        let attempts = i32::try_from(task.runs.len()).unwrap();
        match what {
            0 | 1 => drop(task.steps.insert(step, value)),
            2 => task.run().state = State::Completed,
            3 => {
                task.run().state = State::Failed;
                if attempts < task.max_attempts {
                    let id = self.client.get_task_status(task.id).await.unwrap().unwrap().last_attempt_run.unwrap();
                    let state = State::Pending;
                    task.runs.push(Run { id, attempt: attempts + 1, state, place, holder: None, waits_for: None });
                }
            }
            4 => (task.run().state, task.run().holder) = (State::Pending, None),
            _ if waits => {
                let run = task.run();
                (run.state, run.holder, run.waits_for) = (State::Sleeping, None, Some(event));
            }
            _ => {}
        }
    }

    async fn cancel(&mut self) {
        let Some(index) = self.some_task() else { return };
        self.log.push(format!("cancel task {index}"));
        let task = &mut self.model.tasks[index];
        let CancelOutcome { cancelled, .. } = self.client.cancel_task_by_id(task.id).await.unwrap();
        let live = matches!(task.state(), State::Pending | State::Running | State::Sleeping);
        assert_eq!(cancelled, live, "{task:?}");
        if live {
            task.run().state = State::Cancelled;
        }
    }

    async fn retry(&mut self) {
        let Some(index) = self.some_task() else { return };
        self.log.push(format!("retry task {index}"));
        let place = self.model.place();
        let task = &mut self.model.tasks[index];
        let retried = self.client.retry_task(task.id, RetryOptions::default()).await;
        if task.state() != State::Failed {
            assert_eq!(retried.unwrap_err().reason().as_str(), "TASK_NOT_FAILED");
            return;
        }
        let retried = retried.unwrap();
        let attempt = i32::try_from(task.runs.len()).unwrap() + 1;
        assert_eq!(retried.attempt, attempt);
        task.max_attempts = task.max_attempts.max(attempt);
        let id = retried.run_id;
        task.runs.push(Run { id, attempt, state: State::Pending, place, holder: None, waits_for: None });
    }

    async fn emit(&mut self) {
        let event = EVENTS[self.below(EVENTS.len())];
        self.log.push(format!("emit {event}"));
        let value = i64::try_from(self.log.len()).unwrap();
        let emitted = self.client.emit_event(event, &value).await.unwrap();
        let first = !self.model.events.contains_key(event);
        let waiting: Vec<usize> = (0..self.model.tasks.len())
            .filter(|index| {
                let run = self.model.tasks[*index].runs.last().unwrap();
                run.state == State::Sleeping && run.waits_for == Some(event)
            })
            .collect();
        assert_eq!((emitted.applied, emitted.woken), (first, i64::try_from(waiting.len()).unwrap()));
        self.model.events.entry(event).or_insert(value);
        // All of one moment.
        let place = self.model.place();
        for index in waiting {
            let run = self.model.tasks[index].run();
            (run.state, run.place) = (State::Pending, place);
        }
    }

    async fn look(&mut self) {
        let Some(index) = self.some_task() else { return };
        self.log.push(format!("look at task {index}"));
        let task = &self.model.tasks[index];
        let seen = self.client.get_task_status(task.id).await.unwrap().unwrap();
        let attempts = i32::try_from(task.runs.len()).unwrap();
        assert_eq!((seen.state, seen.attempts), (task.state(), attempts), "{task:?}");
    }
}

/// Tells the seed and the story when a comparison fails.
struct Teller<'a>(u64, &'a mut Story);

impl Drop for Teller<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}:\n{}", self.0, self.1.log.join("\n"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_and_a_model_of_the_contract_agree() {
    let server = Server::start().await;
    let asked = std::env::var("ABSURD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let fresh = (0..SEEDS).map(|_| Uuid::new_v4().as_u64_pair().0 >> 32);
    let seeds: Vec<u64> = asked.map_or_else(|| KEPT.iter().copied().chain(fresh).collect(), |seed| vec![seed]);
    for seed in seeds {
        let client = server.client().with_queue(format!("m{seed}"));
        client.create_queue().await.unwrap();
        let random = fastrand::Rng::with_seed(seed);
        let mut story = Story { model: Model::default(), client, claims: Vec::new(), random, log: Vec::new() };
        let teller = Teller(seed, &mut story);
        for _ in 0..STEPS {
            in_time("a step", teller.1.step()).await;
        }
    }
}
