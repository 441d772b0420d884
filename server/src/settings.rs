//! Settings of `absurd serve`. A flag wins over an environment variable, and that over the file. An unknown key in the
//! file is an error.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use serde::Deserialize;

use crate::address::{deserialize_listen, parse_listen};
use crate::app::AppOptions;
use crate::dispatch::DispatchOptions;
use crate::engine::EngineOptions;
use crate::gate::GateOptions;
use crate::libpq;
use crate::store::migrate;
use crate::transport::Limits;
use crate::transport::admission::AdmissionOptions;

/// A text that is never printed.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The secret text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// A duration such as `15s`, `30m` or `1h 30m`.
#[derive(Debug, Clone, Copy)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map(Self).map_err(|error| format!("{error}; write it as 15s, 30m or 1h"))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Declares the settings once: as flags, environment variables and keys of a file, with a method that merges two
/// sources.
macro_rules! settings {
    ($($(#[$meta:meta])* $name:ident: $type:ty,)*) => {
        /// Settings of a server. An absent one has its default.
        #[derive(Debug, Clone, Default, clap::Args, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
        pub struct Settings {
            $($(#[$meta])* pub $name: Option<$type>,)*
        }

        impl Settings {
            /// Field names of all settings.
            const KEYS: &[&str] = &[$(stringify!($name),)*];

            /// These settings, completed by those of `other`.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $($name: self.$name.or(other.$name),)* }
            }
        }
    };
}

settings! {
    /// Database to serve, as a URL or in key=value form [default: libpq's variables, such as PGHOST]
    #[arg(long, env = "ABSURD_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Secret,
    /// Database to LISTEN on [default: the same]; name Postgres itself if the other URL goes through a pooler
    #[arg(long, env = "ABSURD_LISTEN_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    listen_database_url: Secret,
    /// Address to serve on, as HOST:PORT, or :PORT for this machine alone [default: 127.0.0.1:50051]
    #[arg(long, env = "ABSURD_LISTEN", value_name = "ADDR:PORT", value_parser = parse_listen)]
    #[serde(deserialize_with = "deserialize_listen")]
    listen: SocketAddr,
    /// Install or upgrade the schemas before serving
    #[arg(long, env = "ABSURD_MIGRATE", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    migrate: bool,
    /// Do not let direct SQL writers wake the server; it finds their tasks within two seconds
    #[arg(long, env = "ABSURD_NO_DOORBELL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    no_doorbell: bool,
    /// Interval between rounds of cleanup and partition upkeep by the queues' policies; 0s: never [default: 1h, 0s in a
    /// database that upstream's tool made]
    #[arg(long, env = "ABSURD_UPKEEP", value_name = "SPAN")]
    upkeep: Span,
    /// Maximum number of pooled connections to the database [default: 16]
    #[arg(long, env = "ABSURD_MAX_CONNECTIONS", value_name = "N")]
    max_connections: usize,
    /// Maximum number of claim streams [default: 20000]
    #[arg(long, env = "ABSURD_MAX_STREAMS", value_name = "N")]
    max_streams: usize,
    /// Approximate age at which a stream is ended gracefully and opened again [default: 30m]
    #[arg(long, env = "ABSURD_STREAM_AGE", value_name = "SPAN")]
    stream_age: Span,
    /// Interval between heartbeats on a stream [default: 15s]
    #[arg(long, env = "ABSURD_HEARTBEAT", value_name = "SPAN")]
    heartbeat: Span,
    /// Largest params, result or checkpoint in bytes [default: 1048576]
    #[arg(long, env = "ABSURD_MAX_PAYLOAD_BYTES", value_name = "BYTES")]
    max_payload_bytes: usize,
    /// Largest headers of a task in bytes [default: 65536]
    #[arg(long, env = "ABSURD_MAX_HEADERS_BYTES", value_name = "BYTES")]
    max_headers_bytes: usize,
    /// Refuse calls about a run that show no claim token
    #[arg(long, env = "ABSURD_REQUIRE_CLAIM_TOKEN", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    require_claim_token: bool,
    /// Maximum attempts of a task whose spawn over gRPC does not set them [default: 5]
    #[arg(long, env = "ABSURD_DEFAULT_MAX_ATTEMPTS", value_name = "N")]
    default_max_attempts: i32,
    /// Maximum number of claim streams on one connection [default: 10000]
    #[arg(long, env = "ABSURD_MAX_STREAMS_PER_CONNECTION", value_name = "N")]
    max_streams_per_connection: usize,
    /// Maximum number of claim streams from one address [default: no bound]
    #[arg(long, env = "ABSURD_MAX_STREAMS_PER_CALLER", value_name = "N")]
    max_streams_per_caller: usize,
    /// Maximum number of client connections [default: the number of file descriptors, less 100]
    #[arg(long, env = "ABSURD_MAX_CLIENTS", value_name = "N")]
    max_clients: usize,
    /// Maximum number of calls in flight, not counting streams [default: 20000]
    #[arg(long, env = "ABSURD_MAX_REQUESTS", value_name = "N")]
    max_requests: usize,
    /// Maximum number of writes that wait for their batch, of each kind [default: 50000]
    #[arg(long, env = "ABSURD_MAX_WAITING_WRITES", value_name = "N")]
    max_waiting_writes: usize,
    /// Longest wait for a connection to the database [default: 10s]
    #[arg(long, env = "ABSURD_MAX_CONNECTION_WAIT", value_name = "SPAN")]
    max_connection_wait: Span,
    /// Maximum number of tasks that wait in one queue; further spawns are refused [default: no bound]
    #[arg(long, env = "ABSURD_MAX_BACKLOG", value_name = "N")]
    max_backlog: i64,
    /// Largest request in bytes [default: 16777216]
    #[arg(long, env = "ABSURD_MAX_REQUEST_BYTES", value_name = "BYTES")]
    max_request_bytes: usize,
    /// Largest header block of a request in bytes [default: 65536]
    #[arg(long, env = "ABSURD_MAX_HEADER_LIST_BYTES", value_name = "BYTES")]
    max_header_list_bytes: u32,
    /// Maximum number of items in one batch, 1 to 1,000 [default: 1000]
    #[arg(long, env = "ABSURD_MAX_BATCH", value_name = "N")]
    max_batch: usize,
    /// Maximum number of items on one page, 1 to 1,000 [default: 1000]
    #[arg(long, env = "ABSURD_MAX_PAGE", value_name = "N")]
    max_page: i64,
    /// Deepest nesting of JSON, 1 to 100 [default: 100]
    #[arg(long, env = "ABSURD_MAX_JSON_DEPTH", value_name = "N")]
    max_json_depth: usize,
    /// A client that takes no answer for this long is disconnected [default: 30s]
    #[arg(long, env = "ABSURD_MAX_STALL", value_name = "SPAN")]
    max_stall: Span,
    /// Address for /metrics, /livez and /readyz over plain HTTP [default: none]
    #[arg(long, env = "ABSURD_METRICS_LISTEN", value_name = "ADDR:PORT", value_parser = parse_listen)]
    #[serde(deserialize_with = "deserialize_listen")]
    metrics_listen: SocketAddr,
    /// Longest graceful shutdown [default: 20s]
    #[arg(long, env = "ABSURD_SHUTDOWN_GRACE", value_name = "SPAN")]
    shutdown_grace: Span,
    /// For tests only: let the `TestClockService` set the time of this server
    #[arg(long, env = "ABSURD_TEST_CLOCK", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    test_clock: bool,
    /// PEM file of the certificate to serve TLS with
    #[arg(long, env = "ABSURD_TLS_CERT", value_name = "FILE")]
    tls_cert: PathBuf,
    /// PEM file of the certificate's key
    #[arg(long, env = "ABSURD_TLS_KEY", value_name = "FILE")]
    tls_key: PathBuf,
    /// Log level error, warn, info or debug, or a filter by module [default: info]
    #[arg(long, env = "ABSURD_LOG", value_name = "FILTER")]
    log: String,
    /// Log one JSON object per line
    #[arg(long, env = "ABSURD_LOG_JSON", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    log_json: bool,
}

impl Settings {
    /// Reads a TOML file whose keys are the flags' names.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_toml(&text).map_err(|problem| anyhow::anyhow!("{}{problem}", path.display()))
    }

    /// Reads a TOML text. An error names the key and the line number. It repeats neither line nor value, because either
    /// may hold a password.
    fn from_toml(text: &str) -> Result<Self, String> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start);
            let line = text.get(..at).unwrap_or_default().matches('\n').count() + 1;
            format!(", line {line}: this is not TOML: write each setting as key = value, and texts in double quotes")
        })?;
        let mut settings = Self::default();
        let mut seen = HashSet::new();
        for (key, value) in table {
            let place = place(text, &key);
            let name = key.replace('_', "-");
            if !Self::KEYS.iter().any(|known| known.replace('_', "-") == name) {
                return Err(format!("{place}: there is no setting {key:?}{}", suggestion(&name)));
            }
            if !seen.insert(name.clone()) {
                return Err(format!("{place}: {name:?} is set twice"));
            }
            let kind = value.type_str();
            let one = toml::Table::from_iter([(name.clone(), value)]);
            let one: Self = Self::deserialize(one).map_err(|error| {
                let why = error.message().to_owned();
                match why.rsplit_once("expected ") {
                    _ if name.ends_with("database-url") => {
                        format!("{place}: {name} must be a text, not of type {kind}")
                    }
                    Some((_, expected)) if why.starts_with("invalid") => {
                        format!("{place}: {name} must be {}, not of type {kind}", expected.trim())
                    }
                    _ => format!("{place}: {name}: {}", masked(&why)),
                }
            })?;
            settings = settings.or(one);
        }
        Ok(settings)
    }

    /// Converts to the options of a server, with all defaults filled in.
    pub fn into_app_options(self) -> anyhow::Result<AppOptions> {
        let dispatch = DispatchOptions::default();
        let limits = Limits::default();
        let (admission, gate, engine) = (AdmissionOptions::default(), GateOptions::default(), EngineOptions::default());
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => anyhow::bail!("tls-cert and tls-key go together"),
        };
        Ok(AppOptions {
            database: resolve_database(self.database_url.as_ref())?,
            listen_database: self.listen_database_url.as_ref().map(parse_database).transpose()?,
            listen: self.listen.unwrap_or(DEFAULT_LISTEN),
            queue: None,
            migrate: self
                .migrate
                .unwrap_or(false)
                .then_some(migrate::Options { doorbell: false, no_doorbell: self.no_doorbell.unwrap_or(false) }),
            doorbell: !self.no_doorbell.unwrap_or(false),
            upkeep: self.upkeep.map(|span| span.0),
            connections_max: self.max_connections.unwrap_or(16).max(2),
            dispatch: DispatchOptions {
                heartbeat: self.heartbeat.map_or(dispatch.heartbeat, |span| span.0),
                stream_age: self.stream_age.map_or(dispatch.stream_age, |span| span.0),
                streams_max: self.max_streams.unwrap_or(dispatch.streams_max),
                stall_max: self.max_stall.map_or(dispatch.stall_max, |span| span.0),
            },
            limits: Limits {
                payload_bytes_max: self.max_payload_bytes.unwrap_or(limits.payload_bytes_max),
                headers_bytes_max: self.max_headers_bytes.unwrap_or(limits.headers_bytes_max),
                json_depth_max: within("max-json-depth", self.max_json_depth, limits.json_depth_max, 100)?,
                batch_max: within("max-batch", self.max_batch, limits.batch_max, 1000)?,
                page_max: within("max-page", self.max_page, limits.page_max, 1000)?,
                request_bytes_max: self.max_request_bytes.unwrap_or(limits.request_bytes_max),
                header_list_bytes_max: self.max_header_list_bytes.unwrap_or(limits.header_list_bytes_max),
                require_claim_token: self.require_claim_token.unwrap_or(false),
                default_max_attempts: attempts(self.default_max_attempts, limits.default_max_attempts)?,
            },
            admission: AdmissionOptions {
                requests_max: within("max-requests", self.max_requests, admission.requests_max, COUNT_MAX)?,
                connection_streams_max: within(
                    "max-streams-per-connection",
                    self.max_streams_per_connection,
                    admission.connection_streams_max,
                    COUNT_MAX,
                )?,
                caller_streams_max: self.max_streams_per_caller.unwrap_or(admission.caller_streams_max),
            },
            gate: GateOptions {
                connections_max: bounded("max-clients", self.max_clients, COUNT_MAX)?,
                stall_max: self.max_stall.map_or(gate.stall_max, |span| span.0),
            },
            engine: EngineOptions {
                waiting_max: within("max-waiting-writes", self.max_waiting_writes, engine.waiting_max, COUNT_MAX)?,
                backlog_max: bounded("max-backlog", self.max_backlog, i64::MAX)?,
                tick: engine.tick,
            },
            connection_wait_max: self.max_connection_wait.map_or(Duration::from_secs(10), |span| span.0),
            metrics_listen: self.metrics_listen,
            tls,
            shutdown_grace: self.shutdown_grace.map_or(Duration::from_secs(20), |span| span.0),
            test_clock: self.test_clock.unwrap_or(false),
        })
    }
}

/// Line number of a key in a file, as a part of an error message.
fn place(text: &str, key: &str) -> String {
    let starts = |line: &str| {
        let line = line.trim_start().trim_start_matches(['[', '"', '\'']);
        line.strip_prefix(key)
            .is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric() || "-_".contains(next)))
    };
    text.lines().position(starts).map_or_else(String::new, |index| format!(", line {}", index + 1))
}

/// Suggests the setting whose name is closest to a wrong one, as a part of an error message.
fn suggestion(name: &str) -> String {
    let near = |known: &&str| strsim::jaro_winkler(&known.replace('_', "-"), name);
    let best = Settings::KEYS.iter().max_by(|a, b| near(a).total_cmp(&near(b))).filter(|known| near(known) > 0.8);
    best.map_or_else(String::new, |known| format!("; did you mean {:?}?", known.replace('_', "-")))
}

/// Upper bound of any count. A larger one is a mistake.
const COUNT_MAX: usize = 100_000_000;

/// Checks that a bound is from 1 to `most`.
fn bounded<T: PartialOrd + From<u8> + std::fmt::Display + Copy>(
    name: &str,
    asked: Option<T>,
    most: T,
) -> anyhow::Result<Option<T>> {
    if let Some(value) = asked.filter(|value| *value < T::from(1) || *value > most) {
        anyhow::bail!("{name} must be 1 to {most}, not {value}");
    }
    Ok(asked)
}

/// Checks a number of attempts, with the default `usual`.
fn attempts(asked: Option<i32>, usual: i32) -> anyhow::Result<i32> {
    match asked.unwrap_or(usual) {
        attempts @ 1.. => Ok(attempts),
        attempts => anyhow::bail!("default-max-attempts must be at least 1, not {attempts}"),
    }
}

/// Like [`bounded`], with the default `usual`.
fn within<T: PartialOrd + From<u8> + std::fmt::Display + Copy>(
    name: &str,
    asked: Option<T>,
    usual: T,
    most: T,
) -> anyhow::Result<T> {
    Ok(bounded(name, asked, most)?.unwrap_or(usual))
}

/// Address that a server listens on by default.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 50051);

/// Parses a database URL or `key=value` text. As in libpq, the environment, a service file and a passfile complete it.
/// The error repeats no part of the text, because it may hold a password.
pub fn parse_database(url: &Secret) -> anyhow::Result<tokio_postgres::Config> {
    resolve_database(Some(url))
}

/// Resolves the database of a command: by its URL, otherwise by libpq's environment variables.
pub fn resolve_database(url: Option<&Secret>) -> anyhow::Result<tokio_postgres::Config> {
    let variable = |name: &str| std::env::var(name).ok();
    let environment = libpq::Environment { variable: &variable };
    anyhow::ensure!(
        url.is_some() || environment.names_a_database(),
        "no database was named: set ABSURD_DATABASE_URL or --database-url, or PGHOST, PGDATABASE or PGSERVICE (or run \
         `absurd dev`, which brings its own)"
    );
    let resolved = libpq::resolve(url.map(Secret::expose), &environment).map_err(|problem| match url {
        Some(_) => anyhow::anyhow!(
            "the database URL is not valid: {problem}; expected postgresql://user:password@host:5432/database"
        ),
        None => anyhow::anyhow!("libpq's variables name no database: {problem}"),
    })?;
    for warning in resolved.warnings {
        if tracing::dispatcher::has_been_set() {
            tracing::warn!("{warning}");
        } else {
            eprintln!("warning: {warning}");
        }
    }
    Ok(resolved.config)
}

/// Masks the passwords of URLs and `password=` parts in a foreign text, such as a message about the command line. In
/// doubt, text that may be a password is masked too.
pub fn masked(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    loop {
        let url = rest.find("://").map(|at| at + 3);
        let word = after_password(rest);
        let Some(at) = url.into_iter().chain(word).min() else { break };
        let (before, after) = rest.split_at(at);
        out.push_str(before);
        let (shown, left) = if Some(at) == url { masked_url(after) } else { masked_word(after) };
        out.push_str(&shown);
        rest = left;
    }
    out + rest
}

/// Index at which the value of the first `password =` begins.
fn after_password(text: &str) -> Option<usize> {
    text.match_indices("password").find_map(|(at, word)| {
        let rest = text[at + word.len()..].trim_start();
        let value = rest.strip_prefix('=')?.trim_start();
        Some(text.len() - value.len())
    })
}

/// Masks one libpq value and returns the rest. A value ends with its closing single quote, where a backslash escapes
/// the next character. Without quotes it ends at a blank or a quote.
fn masked_word(value: &str) -> (String, &str) {
    let end = match value.strip_prefix('\'') {
        Some(quoted) => {
            let mut kept = false;
            let close = |next: char| {
                let closes = next == '\'' && !kept;
                kept = next == '\\' && !kept;
                closes
            };
            quoted.find(close).map_or(value.len(), |at| at + 2)
        }
        None => value.find(|next: char| next.is_whitespace() || "\"'".contains(next)).unwrap_or(value.len()),
    };
    ("***".into(), &value[end..])
}

/// Masks the text after `://` and returns the rest. User, host and path are shown; the password and the options are
/// not.
fn masked_url(text: &str) -> (String, &str) {
    let line = &text[..text.find(['\n', '"']).unwrap_or(text.len())];
    let word = line.find(|next: char| next.is_whitespace() || next == '\'').unwrap_or(line.len());
    let authority = &line[..line[..word].find(['/', '?']).unwrap_or(word)];
    // The password may contain a blank or a slash that is not escaped, so the login extends to the last @.
    let login = match line[..word].rfind('@') {
        Some(at) => Some(at),
        None if !names_places(authority) => line.rfind('@').or(Some(word)),
        None => None,
    };
    let (mut shown, place) = match login {
        Some(at) => {
            let user = line[..at].split_once(':').map_or(&line[..at], |(user, _)| user);
            let masked = if user.len() < at { ":***" } else { "" };
            let sign = if line[at..].starts_with('@') { "@" } else { "" };
            (format!("{user}{masked}{sign}"), at + sign.len())
        }
        None => (String::new(), 0),
    };
    let end = line[place..].find(|next: char| next.is_whitespace() || next == '\'').map_or(line.len(), |at| place + at);
    let end = end.max(place);
    let rest = &line[place..end];
    shown.push_str(rest.split_once('?').map_or(rest, |(rest, _)| rest));
    (shown, &text[end..])
}

/// Whether an authority without a login is a list of hosts, with or without ports.
fn names_places(authority: &str) -> bool {
    // The message may continue after the URL.
    authority.trim_end_matches([':', ';', ',', '.', ')']).split(',').all(|place| {
        let port = place.rsplit_once(':').filter(|_| !place.ends_with(']')).map_or("", |(_, port)| port);
        port.chars().all(|digit| digit.is_ascii_digit()) && (place.starts_with('[') || place.matches(':').count() < 2)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_repeated_and_places_are() {
        for (text, shown) in [
            ("postgresql://me:hunter2@db:5432/app", "postgresql://me:***@db:5432/app"),
            ("postgresql://me@db/app", "postgresql://me@db/app"),
            ("argument 'postgresql://me:my hunter2@h/d' found", "argument 'postgresql://me:***@h/d' found"),
            ("argument 'postgresql://me:hunter2' found", "argument 'postgresql://me:***' found"),
            ("postgresql://me:hunter/2@h/d", "postgresql://me:***@h/d"),
            ("postgresql://me:hun@ter2@h/d?password=hunter2", "postgresql://me:***@h/d"),
            ("no server at http://127.0.0.1:1: refused", "no server at http://127.0.0.1:1: refused"),
            ("(try http://localhost:1); or http://[::1]:", "(try http://localhost:1); or http://[::1]:"),
            ("at http://[::1]:50051, https://a:1,b:2/c", "at http://[::1]:50051, https://a:1,b:2/c"),
            ("host=h password=hunter2 user=me", "host=h password=*** user=me"),
            ("host=h password = 'my \\' hunter2' user=me", "host=h password = *** user=me"),
            ("host=h password='my hunter2", "host=h password=***"),
            ("the password is wrong", "the password is wrong"),
        ] {
            assert_eq!(masked(text), shown);
        }
    }

    #[test]
    fn an_unknown_key_in_a_file_is_an_error() {
        let known = Settings::from_toml("listen = \"127.0.0.1:1\"\nheartbeat = \"5s\"").unwrap();
        assert_eq!(known.heartbeat.map(|span| span.0), Some(Duration::from_secs(5)));
        let error = Settings::from_toml("lisen = \"127.0.0.1:1\"").unwrap_err();
        assert_eq!(error, ", line 1: there is no setting \"lisen\"; did you mean \"listen\"?");
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Settings { max_streams: Some(1), ..Settings::default() };
        let file = Settings { max_streams: Some(2), max_connections: Some(3), ..Settings::default() };
        let joined = flags.or(file);
        assert_eq!((joined.max_streams, joined.max_connections), (Some(1), Some(3)));
    }

    #[test]
    fn bounds_that_let_nothing_through_are_errors() {
        let database_url = || Some(Secret::from("postgresql://me@nowhere/db"));
        for settings in [
            Settings { max_requests: Some(0), ..Settings::default() },
            Settings { max_clients: Some(0), ..Settings::default() },
            Settings { max_backlog: Some(-1), ..Settings::default() },
            Settings { max_waiting_writes: Some(usize::MAX), ..Settings::default() },
            Settings { max_json_depth: Some(101), ..Settings::default() },
            Settings { max_batch: Some(1001), ..Settings::default() },
        ] {
            let error =
                Settings { database_url: database_url(), ..settings }.into_app_options().unwrap_err().to_string();
            assert!(error.starts_with("max-"), "{error}");
        }
    }

    #[test]
    fn a_password_is_never_printed() {
        let url = Secret::from("postgresql://me:hunter2@nowhere/db");
        let settings = Settings { database_url: Some(url), ..Settings::default() };
        assert!(!format!("{settings:?}").contains("hunter2"));
        let options = settings.into_app_options().unwrap();
        assert!(!format!("{options:?}").contains("hunter2"));
        let broken = Secret::from("postgresql://me:hunter2@nowhere:notaport/db");
        assert!(!format!("{:#}", parse_database(&broken).unwrap_err()).contains("hunter2"));
        for broken in ["host=nowhere password=my hunter2=x", "postgresql://me@nowhere/db?password=a&hunter2=b"] {
            let error = format!("{:#}", parse_database(&broken.into()).unwrap_err());
            assert!(!error.contains("hunter2") && error.contains("an option"), "{error}");
        }
    }
}
