//! A saga: books a trip piece by piece. If a piece is not available, the booked pieces are cancelled, the last one
//! first. The cancellations are steps too: none is forgotten, and none is repeated once it is stored.
//! `cargo run -p absurd-client --example saga`

use absurd_client::durable::{Absurd, BoxError, Context, TaskError, WorkerOptions};

async fn book_trip(ctx: Context, pieces: Vec<String>) -> Result<Vec<String>, BoxError> {
    let mut booked: Vec<String> = Vec::new();
    for piece in pieces {
        match ctx.step(&format!("book-{piece}"), async || book(&piece).await).await {
            Ok(booking) => booked.push(booking),
            // The run sleeps, or this worker no longer holds it: nothing has failed.
            Err(signal @ TaskError::Signal(_)) => return Err(signal.into()),
            Err(error) => {
                while let Some(booking) = booked.pop() {
                    ctx.step(&format!("cancel-{booking}"), async || cancel(&booking).await).await?;
                }
                return Err(TaskError::failure("TripFailed", error.to_string()).into());
            }
        }
    }
    Ok(booked)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let absurd = Absurd::connect()?;
    absurd.client().create_queue().await?;
    let trip = absurd.register("trip", book_trip);
    let worker = absurd.start_worker(WorkerOptions::default()).await?;
    for pieces in [["flight", "hotel"].as_slice(), &["flight", "hotel", "submarine"]] {
        let pieces = pieces.iter().map(|piece| (*piece).to_owned()).collect();
        let spawned = absurd.spawn(&trip, &pieces).max_attempts(1).await?;
        let end = absurd.await_task_result(&trip, spawned.task_id, None).await?;
        let what = end.result.or(end.failure).map(|json| json.to_string());
        println!("{}: {}", end.state, what.unwrap_or_default());
    }
    worker.stop().await;
    Ok(())
}

async fn book(piece: &str) -> Result<String, BoxError> {
    if piece == "submarine" {
        return Err("no submarine is left".into());
    }
    println!("booked {piece}");
    Ok(format!("{piece}-1"))
}

async fn cancel(booking: &str) -> Result<(), BoxError> {
    println!("cancelled {booking}");
    Ok(())
}
