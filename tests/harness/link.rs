//! A TCP link under a test's control. Bytes pass, come late, trickle, or vanish in one direction or both; or the
//! connection is cut. In front of a Postgres, the answer to a commit can be lost.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

/// Fault of a link, which applies to all its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toxic {
    /// Bytes pass.
    Pass,
    /// Bytes pass after this many ms and a random addition of up to half as many.
    Late(u64),
    /// At most this many bytes a second.
    Slow(u64),
    /// No byte passes towards the server (first field), towards the client (second field).
    Hole(bool, bool),
    /// The server's side is closed; the client's side stays open and receives nothing.
    HalfOpen,
    /// Connections end with a reset, new ones at once. Bytes that a hole held back never arrive.
    Reset,
    /// In this percentage of round trips to Postgres, the request is executed and the connection is cut before the
    /// answer.
    Swallow(u64),
    /// Requests to Postgres to cancel a statement are held back; everything else passes.
    HeldCancels,
    /// Two answers of an HTTP/2 stream are swapped: a planted fault of the network.
    Reorder,
}

/// Target of a link.
#[derive(Debug, Clone)]
pub enum Target {
    /// A port of this machine.
    Port(u16),
    /// A Unix socket.
    Path(PathBuf),
}

/// A TCP port that forwards its connections to a target, with a fault.
#[derive(Debug)]
pub struct Link {
    port: u16,
    target: Arc<watch::Sender<Target>>,
    toxic: Arc<watch::Sender<Toxic>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    swallowed: AtomicU64,
    /// Requests to cancel a statement that are held back.
    cancels: AtomicU64,
}

impl Link {
    /// A link to a target; it passes bytes until a fault is set.
    pub async fn to(target: Target) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let target = Arc::new(watch::Sender::new(target));
        let toxic = Arc::new(watch::Sender::new(Toxic::Pass));
        let counts = Arc::<Counts>::default();
        let (control, counted, there) = (Arc::clone(&toxic), Arc::clone(&counts), Arc::clone(&target));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.connections.fetch_add(1, Ordering::Relaxed);
                let target = there.borrow().clone();
                tokio::spawn(carry(client, target, control.subscribe(), Arc::clone(&counted)));
            }
        });
        Ok(Self { port, target, toxic, counts })
    }

    /// A link in front of an address such as `http://127.0.0.1:1234`.
    pub async fn before(url: &str) -> Self {
        let (_, port) = url.rsplit_once(':').expect("a URL with a port");
        Self::to(Target::Port(port.parse().unwrap())).await.unwrap()
    }

    /// URL that leads through the link.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Port that the link listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sends new connections to another target.
    pub fn lead_to(&self, target: Target) {
        self.target.send_replace(target);
    }

    /// Sets the fault of all connections, present and future.
    pub fn set(&self, toxic: Toxic) {
        self.toxic.send_replace(toxic);
    }

    /// Number of connections that the link accepted.
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// Number of answers that were swallowed.
    pub fn swallowed(&self) -> u64 {
        self.counts.swallowed.load(Ordering::Relaxed)
    }

    /// Number of requests to cancel a statement that are held back.
    pub fn cancels(&self) -> u64 {
        self.counts.cancels.load(Ordering::Relaxed)
    }
}

async fn carry(client: TcpStream, target: Target, toxic: watch::Receiver<Toxic>, counts: Arc<Counts>) {
    let _ = client.set_nodelay(true);
    let Ok(socket) = socket2::SockRef::from(&client).try_clone() else { return };
    let mut control = toxic.clone();
    let done = async {
        match target {
            Target::Port(port) => {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                let _ = server.set_nodelay(true);
                let (input, output) = server.into_split();
                pass(client, input, output, toxic, &counts).await;
            }
            Target::Path(path) => {
                let Ok(server) = UnixStream::connect(&path).await else { return };
                let (input, output) = server.into_split();
                pass(client, input, output, toxic, &counts).await;
            }
        }
    };
    tokio::select! {
        () = done => {}
        _ = control.wait_for(|toxic| *toxic == Toxic::Reset) => {}
    }
    if *control.borrow() == Toxic::Reset {
        let _ = socket.set_linger(Some(Duration::ZERO));
    }
}

async fn pass(
    mut client: TcpStream,
    input: impl AsyncRead + Unpin,
    output: impl AsyncWrite + Unpin,
    toxic: watch::Receiver<Toxic>,
    counts: &Counts,
) {
    let mut control = toxic.clone();

    // Borrowed halves: dropping them sends nothing to the client.
    let (from_client, to_client) = client.split();
    let (tell, armed) = watch::channel(false);
    let there = copy(from_client, output, toxic.clone(), Direction::There(tell), counts);
    let back = copy(input, to_client, toxic, Direction::Back(armed), counts);
    let both = async {
        let mut there = std::pin::pin!(there);
        let mut back = std::pin::pin!(back);
        tokio::select! {
            _ = &mut there => back.await,
            // A swallowed answer cuts the connection at once; after a mere end the other direction goes on to its own
            // end.
            lost = &mut back => lost || there.await,
        }
    };
    let lost = tokio::select! {
        lost = both => Some(lost),
        _ = control.wait_for(|toxic| *toxic == Toxic::HalfOpen) => None,
    };
    match lost {
        Some(true) => {
            counts.swallowed.fetch_add(1, Ordering::Relaxed);
            let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
        }
        Some(false) => {}
        // The server's side is closed by now; the client's side stays open until the link heals.
        None => drop(control.wait_for(|toxic| *toxic != Toxic::HalfOpen).await),
    }
}

enum Direction {
    /// Towards the server; sends whether the next answer is to be swallowed.
    There(watch::Sender<bool>),
    Back(watch::Receiver<bool>),
}

/// Copies one direction to its end. Returns true if an answer was swallowed and the connection is to be cut.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut toxic: watch::Receiver<Toxic>,
    direction: Direction,
    counts: &Counts,
) -> bool {
    let mut buffer = vec![0; 64 * 1024];
    let mut frames = Frames::default();
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let bytes = &buffer[..count];
        let there = matches!(direction, Direction::There(_));
        let stuck = |toxic: &Toxic| match toxic {
            Toxic::Hole(towards_server, towards_client) => *(if there { towards_server } else { towards_client }),
            // The connection is about to be reset; until then no byte may pass.
            Toxic::Reset => true,
            Toxic::HeldCancels => is_cancel(bytes),
            _ => false,
        };
        if is_cancel(bytes) {
            counts.cancels.fetch_add(1, Ordering::Relaxed);
        }
        if toxic.wait_for(|toxic| !stuck(toxic)).await.is_err() {
            break;
        }
        let now = *toxic.borrow();
        match (now, &direction) {
            (Toxic::Late(ms), _) => tokio::time::sleep(Duration::from_millis(ms + fastrand::u64(0..=ms / 2))).await,
            (Toxic::Slow(rate), _) => {
                let micros = u64::try_from(count).unwrap_or(u64::MAX).saturating_mul(1_000_000) / rate.max(1);
                tokio::time::sleep(Duration::from_micros(micros)).await;
            }
            (Toxic::Swallow(percent), Direction::There(tell)) if ends_round(bytes) => {
                tell.send_replace(fastrand::u64(0..100) < percent);
            }
            (Toxic::Swallow(_), Direction::Back(armed)) if *armed.borrow() => {
                if is_ready(bytes) {
                    return true;
                }
                continue;
            }
            _ => {}
        }
        let passed = if now == Toxic::Reorder && !there {
            to.write_all(&frames.swapped(bytes)).await
        } else {
            to.write_all(bytes).await
        };
        if is_cancel(bytes) {
            counts.cancels.fetch_sub(1, Ordering::Relaxed);
        }
        if passed.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
    false
}

/// Whether this asks Postgres to cancel a statement of another connection.
fn is_cancel(bytes: &[u8]) -> bool {
    matches!(bytes, [0, 0, 0, 16, code @ .., _, _, _, _, _, _, _, _] if *code == 80_877_102_u32.to_be_bytes())
}

/// Whether the client waits for an answer now: its message ends with Sync, or it is a simple query.
fn ends_round(bytes: &[u8]) -> bool {
    bytes.ends_with(&[b'S', 0, 0, 0, 4]) || bytes.first() == Some(&b'Q')
}

/// Whether this ends with `ReadyForQuery`: the request is executed, and committed unless a transaction is open.
fn is_ready(bytes: &[u8]) -> bool {
    matches!(bytes, [.., b'Z', 0, 0, 0, 5, b'I' | b'T' | b'E'])
}

/// HTTP/2 frames in transit. The first data frame of each stream is held until the next frame of that stream, and sent
/// after it if that holds data too.
#[derive(Default)]
struct Frames {
    rest: Vec<u8>,
    held: Option<(u32, Vec<u8>)>,
    seen: std::collections::HashSet<u32>,
}

impl Frames {
    fn swapped(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.rest.extend_from_slice(bytes);
        let mut out = Vec::new();
        while let Some(head) = self.rest.get(..9) {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let (kind, stream) = (head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
            if self.rest.len() < 9 + length {
                break;
            }
            let frame: Vec<u8> = self.rest.drain(..9 + length).collect();
            let data = kind == 0 && length > 0;
            match self.held.take() {
                Some((held, first)) if held == stream => {
                    // Not a data frame: the stream ends, and the order no longer matters.
                    let (one, two) = if data { (frame, first) } else { (first, frame) };
                    out.extend(one);
                    out.extend(two);
                }
                None if data && self.seen.insert(stream) => self.held = Some((stream, frame)),
                held => {
                    self.held = held;
                    out.extend(frame);
                }
            }
        }
        out
    }
}
