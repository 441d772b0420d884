//! A TCP proxy in the test's hands: it passes bytes, stops passing them, or resets its connections.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pass,
    /// Connections stay open; nothing gets through in either direction.
    Hole,
    /// Connections end with a reset.
    Reset,
}

/// See the module.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    mode: Arc<watch::Sender<Mode>>,
}

impl Proxy {
    /// A proxy before an address such as `http://127.0.0.1:1234`.
    pub async fn before(url: &str) -> Self {
        let target: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let control = Arc::clone(&mode);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target, control.subscribe()));
            }
        });
        Self { addr, mode }
    }

    /// The URL of the proxy.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Passes bytes again; for new connections, and for those that were in the hole.
    pub fn pass(&self) {
        self.mode.send_replace(Mode::Pass);
    }

    /// Swallows everything.
    pub fn hole(&self) {
        self.mode.send_replace(Mode::Hole);
    }

    /// Resets all connections, and new ones at once.
    pub fn reset(&self) {
        self.mode.send_replace(Mode::Reset);
    }
}

async fn carry(client: TcpStream, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let reset = [&client, &server].map(|stream| socket2::SockRef::from(stream).try_clone().unwrap());
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let there = copy(client_in, server_out, mode.clone());
    let back = copy(server_in, client_out, mode.clone());
    tokio::select! {
        () = async { tokio::join!(there, back); } => {}
        _ = mode.wait_for(|mode| *mode == Mode::Reset) => {
            // Closing with linger 0 sends RST.
            for socket in &reset {
                let _ = socket.set_linger(Some(std::time::Duration::ZERO));
            }
        }
    }
}

async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if mode.wait_for(|mode| *mode != Mode::Hole).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
