//! An agent that asks a model, uses the tool that the model names, and repeats this until the model answers. Each turn
//! is a step, so that a crash costs one turn and not the conversation.
//! `cargo run -p absurd-client --example agent_loop`

use absurd_client::durable::{Absurd, BoxError, Context, WorkerOptions};
use serde::{Deserialize, Serialize};

#[derive(Clone, Serialize, Deserialize)]
enum Message {
    User(String),
    Tool { name: String, input: i64 },
    Output(i64),
    Answer(String),
}

/// Maximum number of turns, which ends an agent that gets no answer.
const TURNS_MAX: usize = 20;

async fn agent(ctx: Context, question: String) -> Result<String, BoxError> {
    let mut messages = vec![Message::User(question)];
    for turn in 1..=TURNS_MAX {
        // Each use of a name is a step of its own: turn, turn#2, turn#3, ...
        let message = ctx.step("turn", async || ask_model(&messages).await).await?;
        messages.push(message.clone());
        match message {
            Message::Answer(answer) => return Ok(answer),
            Message::Tool { name, input } => {
                let output = ctx.step("tool", async || run_tool(&name, input).await).await?;
                messages.push(Message::Output(output));
            }
            Message::User(_) | Message::Output(_) => return Err("the model speaks for somebody else".into()),
        }
        if turn == 2 && ctx.attempt() == 1 {
            return Err("the machine is lost after two turns".into());
        }
    }
    Err(format!("no answer after {TURNS_MAX} turns").into())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let absurd = Absurd::connect()?;
    absurd.client().create_queue().await?;
    let ask = absurd.register("agent", agent);
    let worker = absurd.start_worker(WorkerOptions::default()).await?;
    let spawned = absurd.spawn(&ask, &"double 5 until it is over 30".to_owned()).await?;
    let end = absurd.await_task_result(&ask, spawned.task_id, None).await?;
    println!("{}", end.result.ok_or("it failed")?.to::<String>()?);
    worker.stop().await;
    Ok(())
}

/// Stands in for a model: asks for the double of the last output, and answers once an output exceeds 30.
async fn ask_model(messages: &[Message]) -> Result<Message, BoxError> {
    println!("asking the model with {} messages", messages.len());
    Ok(match messages.last() {
        Some(Message::Output(number)) if *number > 30 => Message::Answer(format!("the answer is {number}")),
        Some(Message::Output(number)) => Message::Tool { name: "double".into(), input: *number },
        _ => Message::Tool { name: "double".into(), input: 5 },
    })
}

async fn run_tool(name: &str, input: i64) -> Result<i64, BoxError> {
    if name == "double" { Ok(input * 2) } else { Err(format!("there is no tool {name}").into()) }
}
