//! The LISTEN connection: outside the pool, never in a transaction.

use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Config, NoTls};

use super::Fault;

/// The one channel of all replicas; a payload's first character says what it is.
pub const CHANNEL: &str = "absurd_server";

/// What the connection says.
#[derive(Debug)]
pub enum Heard {
    /// A payload on the channel.
    Payload(String),
    /// The connection is lost.
    Lost(String),
}

/// Connects and listens. What is heard goes into the channel; it ends with [`Heard::Lost`].
pub async fn listen(database: &Config) -> Result<(tokio_postgres::Client, mpsc::Receiver<Heard>), Fault> {
    let limit = super::pool::Role::Work.statement_timeout();
    let config = super::session_config(database, "absurd server (listen)", limit, super::LOCK_WAIT);
    let (client, mut connection) = config.connect(NoTls).await.map_err(|error| Fault::from_postgres(&error))?;
    let (tell, heard) = mpsc::channel(1024);
    tokio::spawn(async move {
        loop {
            let message = std::future::poll_fn(|cx| connection.poll_message(cx)).await;
            let said = match message {
                Some(Ok(AsyncMessage::Notification(note))) => Heard::Payload(note.payload().to_owned()),
                Some(Ok(_)) => continue,
                Some(Err(error)) => Heard::Lost(error.to_string()),
                None => Heard::Lost("the connection was closed".into()),
            };
            let last = matches!(said, Heard::Lost(_));
            if tell.send(said).await.is_err() || last {
                return;
            }
        }
    });
    client.batch_execute(&format!("listen {CHANNEL}")).await.map_err(|error| Fault::from_postgres(&error))?;
    Ok((client, heard))
}
