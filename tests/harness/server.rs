//! Servers in this process, and raw gRPC clients that show the messages on the wire.

use std::net::SocketAddr;
use std::time::Duration;

use absurd_client::{AbsurdClient, ConnectOptions};
use absurd_proto::v1 as pb;
use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use absurd_server::app::App;
use absurd_server::settings::{Secret, Settings, Span};
use socket2::{Domain, Socket, Type};
use tonic::transport::{Channel, Endpoint};

use crate::Database;

/// Pause between two looks of a server at its queues that is too long for any look to help a test.
const SLOW_TICK: Duration = Duration::from_secs(3600);
/// Pause between two looks that is so short that a test need not wait for them.
const QUICK_TICK: Duration = Duration::from_millis(100);

/// The generated client, without the retries of `AbsurdClient`.
pub type Grpc = AbsurdServiceClient<Channel>;

/// Options of a server; the default is a server with a queue `q`.
#[derive(Debug, Clone, Default)]
pub struct ServerOptions {
    /// Settings of `absurd serve`; those left unset are the harness's.
    pub settings: Settings,
    /// Does not create the queue `q`.
    pub without_queue: bool,
    /// Lets the server look at its queues only once an hour, so that a test sees the effect of hints, wake-ups and
    /// doorbells alone.
    pub slow_tick: bool,
    /// Lets the server look at its queues fifteen times as often, for a test that waits for several looks or for
    /// chores.
    pub quick_tick: bool,
}

/// An address that refuses connections until a server listens there, and that nobody else gets meanwhile.
#[derive(Debug)]
pub struct Place {
    /// The address.
    pub addr: SocketAddr,
    /// Bound, and never listening.
    _reserved: Socket,
}

impl Place {
    /// Reserves an address. A server may listen there, stop, and listen again.
    pub fn reserve() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Lets a server that sets this too, as tokio does, listen on the same address.
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        Self { addr: socket.local_addr().unwrap().as_socket().unwrap(), _reserved: socket }
    }
}

/// A server in this process.
#[derive(Debug)]
pub struct Server {
    app: App,
    database: Database,
}

impl Server {
    /// Starts a server on a database of its own, with a queue `q`.
    pub async fn start() -> Self {
        Self::start_with(Database::new().await, ServerOptions::default()).await
    }

    /// Starts a server on this database, with a queue `q`.
    pub async fn start_on(database: &Database) -> Self {
        Self::start_with(database.clone(), ServerOptions::default()).await
    }

    /// Starts a server that looks at its queues only once an hour, so that no look makes up for a lost hint.
    pub async fn start_on_hints(database: &Database) -> Self {
        Self::start_with(database.clone(), ServerOptions { slow_tick: true, ..ServerOptions::default() }).await
    }

    /// Starts a server on this database with other options.
    pub async fn start_with(database: Database, options: ServerOptions) -> Self {
        let base = Settings {
            database_url: Some(Secret::from(database.url())),
            listen: Some(([127, 0, 0, 1], 0).into()),
            max_connections: Some(8),
            shutdown_grace: Some(Span(Duration::from_secs(5))),
            ..Settings::default()
        };
        let mut app_options = options.settings.or(base).into_app_options().unwrap();
        if options.slow_tick {
            app_options.engine.tick = SLOW_TICK;
        }
        if options.quick_tick {
            app_options.engine.tick = QUICK_TICK;
        }
        let app = App::start(app_options).await.expect("the server starts");
        let server = Self { app, database };
        if !options.without_queue {
            server.client().create_queue().await.expect("the queue is created");
        }
        server
    }

    /// Database of the server.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The app that serves.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// URL of the server.
    pub fn url(&self) -> String {
        format!("http://{}", self.app.addr())
    }

    /// A client of the queue `q`.
    pub fn client(&self) -> AbsurdClient {
        AbsurdClient::connect(&ConnectOptions::new(self.url())).unwrap().with_queue("q").with_worker_id("tester")
    }

    /// A raw client on a connection of its own.
    pub async fn raw(&self) -> Grpc {
        raw(&self.url()).await
    }

    /// Stops the server as SIGTERM would.
    pub async fn stop(self) {
        self.app.shut_down().await.unwrap();
    }
}

/// A raw client on a connection of its own.
pub async fn raw(url: &str) -> Grpc {
    let channel = Endpoint::from_shared(url.to_owned()).unwrap().connect().await.expect("connect to the server");
    AbsurdServiceClient::new(channel).max_decoding_message_size(64 * 1024 * 1024)
}

/// A JSON field of a message, unchecked.
pub fn json(text: impl Into<String>) -> Option<pb::Json> {
    Some(pb::Json { text: text.into() })
}
