//! An order: charges, reserves, waits until the warehouse has packed it, and notifies. The value of each step is
//! stored, so that a crash repeats at most the step in progress.
//! `cargo run -p absurd-client --example order_fulfillment`

use absurd_client::durable::{Absurd, BoxError, Context, WorkerOptions};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Order {
    order_id: String,
    amount: u32,
    items: Vec<String>,
    email: String,
}

#[derive(Serialize, Deserialize)]
struct Payment {
    id: String,
}

#[derive(Serialize, Deserialize)]
struct Shipment {
    tracking_number: String,
}

#[derive(Serialize, Deserialize)]
struct Receipt {
    order_id: String,
    tracking_number: String,
}

async fn process_order(ctx: Context, order: Order) -> Result<Receipt, BoxError> {
    // The task's id is a key by which the payment provider recognises a repeated charge.
    let payment = ctx.step("process-payment", async || charge(ctx.task_id(), order.amount)).await?;
    ctx.step("reserve-inventory", async || reserve(&order.items)).await?;
    let shipment: Shipment = ctx.await_event(&format!("shipment.packed:{}", order.order_id)).await?;
    ctx.step("send-notification", async || send(&order.email, &shipment)).await?;
    Ok(Receipt { order_id: payment.id, tracking_number: shipment.tracking_number })
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let absurd = Absurd::connect()?;
    absurd.client().create_queue().await?;
    let fulfil = absurd.register("order-fulfillment", process_order);
    let worker = absurd.start_worker(WorkerOptions::default().concurrency(4)).await?;

    let order_id = uuid::Uuid::new_v4().to_string();
    let shipped = format!("shipment.packed:{order_id}");
    let order = Order { order_id, amount: 100, items: vec!["widget".into()], email: "a@example.com".into() };
    let spawned = absurd.spawn(&fulfil, &order).await?;
    // The warehouse reports that the order is packed.
    absurd.client().emit_event(&shipped, &Shipment { tracking_number: "TRACK-1".into() }).await?;
    let end = absurd.await_task_result(&fulfil, spawned.task_id, None).await?;
    println!("{}: {}", end.state, end.result.map(|json| json.to_string()).unwrap_or_default());
    worker.stop().await;
    Ok(())
}

fn charge(key: uuid::Uuid, amount: u32) -> Result<Payment, BoxError> {
    println!("charging {amount}");
    Ok(Payment { id: format!("pay-{key}") })
}

fn reserve(items: &[String]) -> Result<usize, BoxError> {
    println!("reserving {}", items.join(", "));
    Ok(items.len())
}

fn send(email: &str, shipment: &Shipment) -> Result<(), BoxError> {
    println!("telling {email} about {}", shipment.tracking_number);
    Ok(())
}
