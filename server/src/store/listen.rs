//! The LISTEN connection. It is outside the pools and never in a transaction, so notifications arrive without delay.

use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Config, NoTls};

use super::Fault;

/// The notification channel that all replicas share. The first character of a payload tells its kind.
pub const CHANNEL: &str = "absurd_server";

/// A message from the LISTEN connection.
#[derive(Debug)]
pub enum Heard {
    /// Payload of a notification on [`CHANNEL`].
    Payload(String),
    /// The connection was lost, with the error. It is the last message.
    Lost(String),
}

/// Connects and listens. The receiver yields notifications, and [`Heard::Lost`] as the last message. The client must be
/// kept: dropping it closes the connection.
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
