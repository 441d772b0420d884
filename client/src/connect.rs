//! Connection options: URLs of the replicas, TLS, timeouts. A channel connects on first use, and again after each loss.

use std::path::PathBuf;
use std::time::Duration;

use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::Error;
use crate::replicas::Replicas;

/// URL of the service when neither the program nor `ABSURD_URL` names one.
pub const DEFAULT_URL: &str = "http://127.0.0.1:50051";
/// Largest message, in bytes, that the client asks the server for (`max_message_bytes`).
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Options of a connection.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// URL of the service, or the URLs of its replicas separated by commas; `https` means TLS. `HOST:PORT`, and `:PORT`
    /// for this machine, mean `http`.
    pub url: String,
    /// TLS settings. The system's root certificates are not used: name the authority in [`TlsOptions::ca`].
    pub tls: TlsOptions,
    /// Longest time to establish a connection.
    pub connect_timeout: Duration,
    /// Interval of keepalive pings, also on an idle connection.
    pub keepalive: Duration,
    /// Longest duration of a call, repetitions included.
    pub deadline: Duration,
}

/// Certificates of a TLS connection.
#[derive(Debug, Clone, Default)]
pub struct TlsOptions {
    /// PEM file of the authority that signed the server's certificate.
    pub ca: Option<PathBuf>,
    /// PEM files of the client's own certificate and its key, which the client presents to the server.
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
    /// The default options with this URL; see [`ConnectOptions::url`].
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), ..Self::default() }
    }

    /// The default options, with the URL from `ABSURD_URL` if that is set and not empty.
    pub fn from_env() -> Self {
        std::env::var("ABSURD_URL").ok().filter(|url| !url.is_empty()).map_or_else(Self::default, Self::new)
    }

    /// One client per replica. Each connects on first use, and again after each lost connection.
    pub(crate) fn replicas(&self) -> Result<Replicas, Error> {
        let mut clients = Vec::new();
        for url in self.urls()? {
            let client = AbsurdServiceClient::new(self.endpoint(&url)?.connect_lazy())
                // No limit on encoding: the server refuses an oversized request with a reason. A local refusal would
                // pass for a lost connection.
                .max_decoding_message_size(MESSAGE_BYTES_MAX * 2);
            clients.push(client);
        }
        Ok(Replicas::new(clients))
    }

    /// The URL of each replica, with its scheme. Errors when there is none, when a scheme is neither `http` nor
    /// `https`, and when a URL holds a login.
    pub fn urls(&self) -> Result<Vec<String>, Error> {
        let parts = self.url.split(',').map(str::trim).filter(|url| !url.is_empty());
        let urls: Vec<String> = parts.map(whole_url).collect::<Result<_, _>>()?;
        if urls.is_empty() {
            return Err(Error::argument("url", "must not be empty"));
        }
        Ok(urls)
    }

    /// A channel to the first replica; it connects on first use.
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

/// Adds a missing scheme and host. Refuses a URL with a login, so that no later message can repeat a password; errors
/// of this function repeat at most the scheme.
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
