//! Reaching the server: no command waits without a message, and every error names the address and the cause.

use std::io::ErrorKind;
use std::time::Duration;

use absurd_client::{ConnectOptions, Reason};
use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::ClientArgs;
use super::output::note;

/// Time without an answer after which a command explains its wait.
const SILENCE: Duration = Duration::from_secs(2);
/// Pause between checks of a server that does not answer.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest pause between checks while a command follows long work; the pause doubles up to it.
const LOOK_RARELY: Duration = Duration::from_secs(10);
/// Longest wait for the answer to a health check.
const HEALTH_MAX: Duration = Duration::from_secs(3);
/// Time of absence after which an operator's command gives the server up.
const GIVE_UP: Duration = Duration::from_secs(10);
/// Longest time of each part of a check.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// The HTTP/2 preface with an empty SETTINGS frame. The first bytes of the answer tell the kind of the server.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// The result of a check of an address.
#[derive(Debug)]
enum Seen {
    /// An HTTP/2 server without TLS.
    Http2,
    Tls,
    /// A web server without HTTP/2.
    Http1,
    /// A server that accepts the connection and sends no known answer.
    Unknown,
    /// No server accepts the connection; holds the cause.
    Nobody(String),
}

async fn look(url: &str) -> Seen {
    let Ok(uri) = url.parse::<http::Uri>() else { return Seen::Nobody("this is no URL".into()) };
    let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16();
    let mut stream = match timeout(LOOK_MAX, TcpStream::connect((host, port.unwrap_or(default)))).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {
            let hint = if port.is_some() { "" } else { " (the URL names no port; a server's default is 50051)" };
            return Seen::Nobody(format!("connection refused{hint}"));
        }
        Ok(Err(error)) => return Seen::Nobody(error.to_string()),
        Err(_) => return Seen::Nobody(format!("no answer within {}", humantime::format_duration(LOOK_MAX))),
    };
    let mut first = [0_u8; 4];
    let asked = async {
        stream.write_all(PREFACE).await?;
        stream.read_exact(&mut first).await
    };
    match timeout(LOOK_MAX, asked).await {
        // A TLS alert.
        Ok(Ok(_)) if first[..2] == [0x15, 0x03] => Seen::Tls,
        Ok(Ok(_)) if &first == b"HTTP" => Seen::Http1,
        Ok(Ok(_)) if first[..2] == [0, 0] => Seen::Http2,
        _ => Seen::Unknown,
    }
}

/// The reason why a server cannot be used.
#[derive(Debug)]
struct Problem {
    text: String,
    /// No server accepts connections there.
    is_absence: bool,
}

impl Problem {
    fn mistake(text: String) -> Self {
        Self { text, is_absence: false }
    }

    fn into_error(self) -> anyhow::Error {
        if self.is_absence { anyhow::anyhow!("{}; {NEXT_STEP}", self.text) } else { anyhow::anyhow!(self.text) }
    }
}

/// The problem at a URL; `None`: the server there speaks the protocol of the URL.
async fn problem(url: &str) -> Option<Problem> {
    let encrypted = url.starts_with("https:");
    match look(url).await {
        Seen::Http2 if encrypted => Some(Problem::mistake(format!(
            "the server at {url} speaks plain HTTP; write {}",
            url.replacen("https:", "http:", 1)
        ))),
        Seen::Tls if !encrypted => Some(Problem::mistake(format!(
            "the server at {url} speaks TLS; write {}, and name its authority with --tls-ca FILE",
            url.replacen("http:", "https:", 1)
        ))),
        Seen::Http1 => {
            let text = format!("a web server answers at {url}, not a gRPC server; look at the port");
            Some(Problem::mistake(text))
        }
        Seen::Http2 | Seen::Tls => None,
        Seen::Unknown => {
            Some(Problem::mistake(format!("something at {url} takes connections and does not speak HTTP/2")))
        }
        Seen::Nobody(cause) => Some(Problem { text: format!("no server answers at {url}: {cause}"), is_absence: true }),
    }
}

/// The common problem of all replicas; `None`: at least one of them can be used.
async fn common_problem(urls: &[String]) -> Option<Problem> {
    let mut looks = tokio::task::JoinSet::new();
    for url in urls {
        let url = url.clone();
        looks.spawn(async move { problem(&url).await });
    }
    let mut problems = Vec::new();
    while let Some(found) = looks.join_next().await {
        problems.push(found.ok()??);
    }
    let is_absence = problems.iter().all(|problem| problem.is_absence);
    let text = problems.into_iter().map(|problem| problem.text).collect::<Vec<_>>().join("; ");
    Some(Problem { text, is_absence })
}

const NEXT_STEP: &str = "is it running? start one with: absurd dev (or name another one with --url or ABSURD_URL)";

/// The kind of work that a command waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// An answer that is due at once. Silence is reported; an absent server is given up after `GIVE_UP`.
    Answer,
    /// Long work. An absent server is reported, and given up after `GIVE_UP`.
    Work,
    /// The end of something slow. An absent server is reported, and waited for.
    End,
}

impl ClientArgs {
    /// The URLs of all replicas.
    pub(super) fn urls(&self) -> anyhow::Result<Vec<String>> {
        Ok(ConnectOptions::new(&self.url).urls()?)
    }

    /// The health of one replica. The error explains why it cannot be asked.
    pub(super) async fn health_of(&self, url: &str) -> anyhow::Result<ServingStatus> {
        let mut endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(HEALTH_MAX).timeout(HEALTH_MAX);
        if url.starts_with("https:") {
            let mut tls = ClientTlsConfig::new();
            if let Some(ca) = &self.tls_ca {
                let pem = std::fs::read(ca).with_context(|| format!("cannot read {}", ca.display()))?;
                tls = tls.ca_certificate(Certificate::from_pem(pem));
            }
            endpoint = endpoint.tls_config(tls)?;
        }
        let check = async {
            let channel = endpoint.connect().await?;
            let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
            anyhow::Ok(answer.map_err(absurd_client::Error::from)?.into_inner().status())
        };
        match check.await {
            Ok(status) => Ok(status),
            Err(error) => Err(match problem(url).await {
                Some(problem) => problem.into_error(),
                None => error.context(format!("the connection to {url} failed")),
            }),
        }
    }

    /// Runs an operator's command. Silence is reported after 2 s; an absent server is given up after 10 s.
    pub(super) async fn reach<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        self.watched(Waits::Answer, work).await
    }

    /// Runs work that may take long, and that ends without a server.
    pub(super) async fn work<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        self.watched(Waits::Work, work).await
    }

    /// Runs work that may take long by itself; an absent server is reported, and waited for.
    pub(super) async fn follow<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        self.watched(Waits::End, work).await
    }

    async fn watched<T>(&self, waits: Waits, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let urls = self.urls()?;
        let watch = Box::pin(async {
            // Time at which the server was last there, or the time of the start.
            let mut seen = Instant::now();
            let mut told = None;
            let mut every = SILENCE;
            loop {
                sleep(every).await;
                every = if waits != Waits::End { LOOK_EVERY } else { (every * 2).min(LOOK_RARELY) };
                let found = match common_problem(&urls).await {
                    Some(problem) if waits != Waits::End && seen.elapsed() >= GIVE_UP => {
                        return problem.into_error();
                    }
                    Some(problem) => Some(format!("{}; trying again", problem.text)),
                    None => {
                        seen = Instant::now();
                        self.unready(&urls, waits).await
                    }
                };
                match &found {
                    Some(problem) if found != told => note!("{problem}"),
                    None if told.is_some() => note!("the server at {} answers again", urls.join(",")),
                    Some(_) | None => {}
                }
                told = found;
            }
        });
        tokio::select! {
            biased;
            outcome = work => match outcome {
                Ok(done) => Ok(done),
                Err(error) => Err(explained(error, &urls).await),
            },
            gave_up = watch => Err(gave_up),
        }
    }

    /// The cause of a call's failure to reach the server.
    pub(super) async fn cause(&self, error: &absurd_client::Error) -> String {
        let urls = self.urls().unwrap_or_default();
        match common_problem(&urls).await {
            Some(problem) => problem.text,
            None => format!("the connection to {} failed: {error}", urls.join(",")),
        }
    }

    /// The message about a server that is there but has not answered yet.
    async fn unready(&self, urls: &[String], waits: Waits) -> Option<String> {
        for url in urls {
            if matches!(self.health_of(url).await, Ok(ServingStatus::NotServing)) {
                return Some(format!("the server at {url} is not ready: its database does not answer; waiting"));
            }
        }
        (waits == Waits::Answer).then(|| format!("waiting for the answer of {}", urls.join(",")))
    }
}

/// Adds the address and the cause to an error of the transport.
async fn explained(error: anyhow::Error, urls: &[String]) -> anyhow::Error {
    let Some(call) = error.downcast_ref::<absurd_client::Error>() else { return error };
    match call.reason() {
        Reason::Transport => match common_problem(urls).await {
            Some(problem) => problem.into_error(),
            None => error.context(format!("the connection to {} failed", urls.join(","))),
        },
        _ => error,
    }
}
