//! How a client reaches the service.

use std::path::PathBuf;
use std::time::Duration;

use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::Error;
use crate::replicas::Replicas;

/// Where the service is when nothing says otherwise.
pub const DEFAULT_URL: &str = "http://127.0.0.1:50051";
/// Largest message that a client takes; a stream tells the server so.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Options of a connection.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// One URL, or several replicas' with commas between; `https` means TLS. `HOST:PORT` and `:PORT` (on this machine) are
    /// URLs too, without TLS.
    pub url: String,
    /// TLS; the system's roots are not read: name what to trust.
    pub tls: TlsOptions,
    /// Longest time for a connection to come about.
    pub connect_timeout: Duration,
    /// Between keepalive pings on an idle connection.
    pub keepalive: Duration,
    /// Longest time of a call, retries included.
    pub deadline: Duration,
}

/// What to trust and what to show.
#[derive(Debug, Clone, Default)]
pub struct TlsOptions {
    /// PEM file of the authority that signed the server's certificate.
    pub ca: Option<PathBuf>,
    /// PEM files of our own certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name in the server's certificate, where it differs from the URL's host.
    pub domain: Option<String>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            url: DEFAULT_URL.into(),
            tls: TlsOptions::default(),
            connect_timeout: Duration::from_secs(5),
            keepalive: Duration::from_secs(20),
            deadline: Duration::from_secs(30),
        }
    }
}

impl ConnectOptions {
    /// Options for a URL.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), ..Self::default() }
    }

    /// The URL from `ABSURD_URL`, else the default one.
    pub fn from_env() -> Self {
        std::env::var("ABSURD_URL").ok().filter(|url| !url.is_empty()).map_or_else(Self::default, Self::new)
    }

    /// One client per replica, which connects when it is first used, and again whenever it has to.
    pub(crate) fn replicas(&self) -> Result<Replicas, Error> {
        let mut clients = Vec::new();
        for url in self.urls()? {
            let client = AbsurdServiceClient::new(self.endpoint(&url)?.connect_lazy())
                // The server refuses what is too large for it, by a reason; here it would pass for a lost connection.
                .max_decoding_message_size(MESSAGE_BYTES_MAX * 2);
            clients.push(client);
        }
        Ok(Replicas::new(clients))
    }

    /// The URL of each replica, with its scheme; at least one.
    pub fn urls(&self) -> Result<Vec<String>, Error> {
        let parts = self.url.split(',').map(str::trim).filter(|url| !url.is_empty());
        let urls: Vec<String> = parts.map(whole_url).collect::<Result<_, _>>()?;
        if urls.is_empty() {
            return Err(Error::argument("url", "must not be empty"));
        }
        Ok(urls)
    }

    /// A channel to the first replica.
    pub(crate) fn channel(&self) -> Result<Channel, Error> {
        let url = self.urls()?.swap_remove(0);
        Ok(self.endpoint(&url)?.connect_lazy())
    }

    fn endpoint(&self, url: &str) -> Result<Endpoint, Error> {
        let wrong = |error: tonic::transport::Error| {
            use std::error::Error as _;
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            Error::argument("url", format!("{url}: {error}{cause}; expected {DEFAULT_URL} or the like"))
        };
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(wrong)?
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(self.keepalive)
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(Duration::from_secs(30)))
            .initial_stream_window_size(1024 * 1024)
            .initial_connection_window_size(4 * 1024 * 1024)
            .user_agent(concat!("absurd-client/", env!("CARGO_PKG_VERSION")))
            .map_err(wrong)?;
        if url.starts_with("https:") { endpoint.tls_config(self.tls.config()?).map_err(wrong) } else { Ok(endpoint) }
    }
}

/// Adds the scheme and the host that people leave out. A URL with a login is refused, so no later message can repeat a
/// password; the errors here repeat the scheme alone.
fn whole_url(text: &str) -> Result<String, Error> {
    let place = text.split_once("://").map_or(text, |(_, place)| place);
    let has_login = place.split('/').next().is_some_and(|authority| authority.contains('@'));
    match text.split_once("://") {
        None | Some(("http" | "https", _)) if has_login => {
            Err(Error::argument("url", "must not hold a login: this service takes no user and password in its URL"))
        }
        Some(("http" | "https", _)) => Ok(text.to_owned()),
        Some((scheme, _)) => {
            let problem = format!("the scheme {scheme:?} is not http or https; expected {DEFAULT_URL} or the like");
            Err(Error::argument("url", problem))
        }
        None if text.starts_with(':') => Ok(format!("http://127.0.0.1{text}")),
        None => Ok(format!("http://{text}")),
    }
}

impl TlsOptions {
    fn config(&self) -> Result<ClientTlsConfig, Error> {
        let read = |field: &str, path: &PathBuf| {
            std::fs::read(path).map_err(|error| Error::argument(field, format!("{}: {error}", path.display())))
        };
        let mut config = ClientTlsConfig::new();
        if let Some(ca) = &self.ca {
            config = config.ca_certificate(Certificate::from_pem(read("tls.ca", ca)?));
        }
        if let Some((certificate, key)) = &self.identity {
            let identity = Identity::from_pem(read("tls.identity", certificate)?, read("tls.identity", key)?);
            config = config.identity(identity);
        }
        if let Some(domain) = &self.domain {
            config = config.domain_name(domain.clone());
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_leave_out_of_a_url_is_added() {
        let urls = ConnectOptions::new("127.0.0.1:50051, :6000,https://db.example,localhost:1").urls().expect("URLs");
        let expected = ["http://127.0.0.1:50051", "http://127.0.0.1:6000", "https://db.example", "http://localhost:1"];
        assert_eq!(urls, expected);
        let error = ConnectOptions::new("postgresql://me:hunter2@db/app").urls().expect_err("a database");
        assert!(error.message().contains("postgresql") && !error.message().contains("hunter2"), "{error}");
        for login in ["http://me:hunter2@db:50051", "me:hunter2@db", "http://db,https://hunter2@db/"] {
            let error = ConnectOptions::new(login).urls().expect_err("a login");
            assert!(error.message().contains("login") && !error.message().contains("hunter2"), "{error}");
        }
        assert_eq!(ConnectOptions::new(" ,").urls().expect_err("none").field(), Some("url"));
    }
}
