//! The gate admits connections up to a bound and survives a lack of file descriptors. It tracks each connection and
//! cuts those that send nothing, read nothing, or flood the server with frames that ask for nothing.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::transport::server::Connected;

use crate::metrics;

/// Bytes of the HTTP/2 client preface. A connection that sends less is not a client.
const PREFACE_BYTES: u64 = 24;
/// Longest time from the connect to the end of the preface.
const PREFACE_MAX: Duration = Duration::from_secs(10);
/// Bytes per second of frames that ask for nothing (pings, settings, window updates), and the largest burst of them.
const IDLE_BYTES_RATE: u64 = 1024 * 1024;
/// Request bytes per connection that the transport buffers before a service reads them (HTTP/2's connection window).
pub const WINDOW_BYTES: u32 = 8 * 1024 * 1024;
/// Bound on received bytes that belong to no request yet: the burst, and a whole window that waits to be read.
const IDLE_BYTES_MAX: u64 = IDLE_BYTES_RATE + WINDOW_BYTES as u64;
/// Bytes credited to each request for its headers.
const HEADER_BYTES: u64 = 16 * 1024;
/// File descriptors kept for Postgres connections and files.
const SPARE_FILES: u64 = 100;
/// Pause between checks of all connections.
const LOOK: Duration = Duration::from_secs(1);
/// Accepted connections that may wait for the transport.
const WAITING_MAX: usize = 128;
/// Longest pause of the accept loop after an error, such as a lack of file descriptors.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Bounds on client connections.
#[derive(Debug, Clone, Copy)]
pub struct GateOptions {
    /// Maximum number of connections; None: the limit of file descriptors less 100, at least 16.
    pub connections_max: Option<usize>,
    /// A connection whose peer takes no answer for this long is cut.
    pub stall_max: Duration,
}

impl Default for GateOptions {
    fn default() -> Self {
        Self { connections_max: None, stall_max: Duration::from_secs(30) }
    }
}

/// Raises this process's limit of file descriptors to the hard limit; returns the limit in force.
fn files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum && setrlimit(Resource::Nofile, raised).is_ok() {
        return limit.maximum.unwrap_or(u64::MAX);
    }
    limit.current.unwrap_or(u64::MAX)
}

/// Progress of one response; shows whether the peer takes it.
#[derive(Debug)]
pub struct Answer {
    /// When the transport last asked for more, in ms since the gate opened.
    asked: AtomicU64,
    /// The transport would take more, but the response has nothing for it.
    waits: AtomicBool,
}

impl Answer {
    /// The transport asked for more at `at`; `waits`: the response had nothing for it.
    pub fn asked(&self, at: u64, waits: bool) {
        self.asked.store(at, Ordering::Relaxed);
        self.waits.store(waits, Ordering::Relaxed);
    }
}

/// State of one open connection.
#[derive(Debug)]
pub struct Connection {
    id: u64,
    peer: SocketAddr,
    gate: Arc<Gate>,
    since: Instant,
    heard: AtomicU64,
    /// Received bytes that asked for nothing, less those leaked away at `IDLE_BYTES_RATE`; and the time of this
    /// reckoning.
    idle: Mutex<(f64, Instant)>,
    dead: AtomicBool,
    waker: AtomicWaker,
    streams: AtomicUsize,
    answers: Mutex<HashMap<u64, Weak<Answer>>>,
    next: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// IP address of the client.
    pub fn caller(&self) -> IpAddr {
        self.peer.ip()
    }

    /// The gate that admitted the connection.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Number of claim streams on the connection.
    pub fn streams(&self) -> &AtomicUsize {
        &self.streams
    }

    /// Registers a response; the id is for [`Self::answered`].
    pub fn answer(&self) -> (u64, Arc<Answer>) {
        let answer = Arc::new(Answer { asked: AtomicU64::new(self.gate.now()), waits: AtomicBool::new(false) });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.answers).insert(id, Arc::downgrade(&answer));
        (id, answer)
    }

    /// Forgets a response that is over.
    pub fn answered(&self, id: u64) {
        lock(&self.answers).remove(&id);
    }

    /// Credits bytes that belonged to a request.
    pub fn asked_with(&self, bytes: u64) {
        lock(&self.idle).0 -= bytes as f64;
    }

    /// Credits the headers of a new request.
    pub fn asked(&self) {
        self.asked_with(HEADER_BYTES);
    }

    fn hear(&self, bytes: u64) {
        self.heard.fetch_add(bytes, Ordering::Relaxed);
        let mut idle = lock(&self.idle);
        let now = Instant::now();
        let leaked = now.duration_since(idle.1).as_secs_f64() * IDLE_BYTES_RATE as f64;
        *idle = ((idle.0 - leaked).max(-(IDLE_BYTES_RATE as f64)) + bytes as f64, now);
        if idle.0 > IDLE_BYTES_MAX as f64 {
            drop(idle);
            self.cut("flood");
        }
    }

    fn cut(&self, why: &'static str) {
        if !self.dead.swap(true, Ordering::Relaxed) {
            metrics::connection_cut(why);
            tracing::warn!(peer = %self.peer, why, "a connection is cut");
            self.waker.wake();
        }
    }

    /// Whether the connection has responses, and the peer has taken none of them for longer than `stall_max`.
    fn is_stalled(&self, now: u64, stall_max: Duration) -> bool {
        let answers = lock(&self.answers);
        let limit = u64::try_from(stall_max.as_millis()).unwrap_or(u64::MAX);
        let stalled = |answer: &Answer| {
            !answer.waits.load(Ordering::Relaxed) && now.saturating_sub(answer.asked.load(Ordering::Relaxed)) > limit
        };
        !answers.is_empty() && answers.values().all(|answer| answer.upgrade().is_none_or(|answer| stalled(&answer)))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.gate.connections).remove(&self.id);
    }
}

/// All connections of this server, with their bounds.
#[derive(Debug)]
pub struct Gate {
    connections_max: usize,
    stall_max: Duration,
    opened: Instant,
    connections: Mutex<HashMap<u64, Weak<Connection>>>,
    next: AtomicU64,
}

impl Gate {
    /// A gate without connections. Without a bound in `options` it raises the limit of file descriptors.
    pub fn new(options: GateOptions) -> Arc<Self> {
        let room = || usize::try_from(files().saturating_sub(SPARE_FILES)).unwrap_or(usize::MAX).max(16);
        Arc::new(Self {
            connections_max: options.connections_max.unwrap_or_else(room),
            stall_max: options.stall_max,
            opened: Instant::now(),
            connections: Mutex::new(HashMap::new()),
            next: AtomicU64::new(0),
        })
    }

    /// Milliseconds since the gate opened.
    pub fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Number of open connections.
    pub fn connections(&self) -> usize {
        lock(&self.connections).len()
    }

    /// Number of claim streams on all connections from one IP address.
    pub fn streams_of(&self, caller: IpAddr) -> usize {
        let connections: Vec<Arc<Connection>> = lock(&self.connections).values().filter_map(Weak::upgrade).collect();
        let of = connections.iter().filter(|connection| connection.caller() == caller);
        of.map(|connection| connection.streams.load(Ordering::Relaxed)).sum()
    }

    fn admit(self: &Arc<Self>, socket: TcpStream, peer: SocketAddr) -> Option<Io> {
        let mut connections = lock(&self.connections);
        if connections.len() >= self.connections_max {
            drop(connections);
            metrics::connection_cut("limit");
            return None;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            peer,
            gate: Arc::clone(self),
            since: Instant::now(),
            heard: AtomicU64::new(0),
            idle: Mutex::new((0.0, Instant::now())),
            dead: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            streams: AtomicUsize::new(0),
            answers: Mutex::new(HashMap::new()),
            next: AtomicU64::new(0),
        });
        connections.insert(id, Arc::downgrade(&connection));
        Some(Io { socket, connection })
    }

    /// Accepts connections forever. After an error it pauses, twice as long each time, at most a second.
    pub async fn accept(self: Arc<Self>, listener: TcpListener, tell: mpsc::Sender<io::Result<Io>>) {
        let mut pause = Duration::from_millis(5);
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    pause = Duration::from_millis(5);
                    let _ = socket.set_nodelay(true);
                    if let Some(io) = self.admit(socket, peer)
                        && tell.send(Ok(io)).await.is_err()
                    {
                        return;
                    }
                }
                Err(error) => {
                    metrics::accept_failed(&error);
                    if pause >= PAUSE_MAX {
                        tracing::warn!(%error, "no connection can be taken; trying again");
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    /// Checks all connections once per second, forever; cuts the silent and the stalled ones.
    pub async fn watch(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let connections: Vec<Arc<Connection>> =
                lock(&self.connections).values().filter_map(Weak::upgrade).collect();
            let now = self.now();
            for connection in connections {
                if connection.heard.load(Ordering::Relaxed) < PREFACE_BYTES && connection.since.elapsed() > PREFACE_MAX
                {
                    connection.cut("silent");
                } else if connection.is_stalled(now, self.stall_max) {
                    connection.cut("stalled");
                }
            }
        }
    }
}

/// The channel from [`Gate::accept`] to the transport.
pub fn channel() -> (mpsc::Sender<io::Result<Io>>, mpsc::Receiver<io::Result<Io>>) {
    mpsc::channel(WAITING_MAX)
}

/// The socket of an admitted connection; counts the bytes read, and fails once the connection is cut.
#[derive(Debug)]
pub struct Io {
    socket: TcpStream,
    connection: Arc<Connection>,
}

impl Connected for Io {
    type ConnectInfo = Arc<Connection>;

    fn connect_info(&self) -> Arc<Connection> {
        Arc::clone(&self.connection)
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "cut by the server")
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.connection.waker.register(cx.waker());
        if self.connection.dead.load(Ordering::Relaxed) {
            return Poll::Ready(Err(cut()));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.socket).poll_read(cx, buffer);
        let count = buffer.filled().len() - before;
        if count > 0 {
            self.connection.hear(count as u64);
        }
        polled
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.connection.dead.load(Ordering::Relaxed) {
            return Poll::Ready(Err(cut()));
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.connection.dead.load(Ordering::Relaxed) {
            return Poll::Ready(Err(cut()));
        }
        Pin::new(&mut self.socket).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}
