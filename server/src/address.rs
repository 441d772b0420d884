//! Parses listen addresses: a host name or IP address with a port, or a port alone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _};

use serde::{Deserialize as _, Deserializer};

/// Parses `127.0.0.1:23001`, `[::1]:23001`, `localhost:23001`, `:23001` or `23001`. Without a host the address is
/// 127.0.0.1, because anyone who reaches the port can use the server. A host name is looked up; its first IPv4 address
/// is preferred.
pub fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let port_alone = text.strip_prefix(':').unwrap_or(text);
    if !port_alone.is_empty() && port_alone.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port(port_alone)?));
    }
    if text.contains("://") {
        return Err("this is a URL; an address to listen on has no scheme, as in 127.0.0.1:50051".into());
    }
    if text.parse::<IpAddr>().is_ok() {
        return Err(format!("there is no port; write it as {}", with_port(text)));
    }
    let Some((host, digits)) = text.rsplit_once(':') else {
        return Err(format!("there is no port; write it as {}", with_port(text)));
    };
    let found = (host, port(digits)?).to_socket_addrs();
    let found: Vec<SocketAddr> = found.map_err(|error| format!("cannot find host {host:?}: {error}"))?.collect();
    let address = found.iter().find(|address| address.is_ipv4()).or(found.first());
    address.copied().ok_or_else(|| format!("host {host:?} has no address"))
}

fn with_port(host: &str) -> String {
    if host.contains(':') { format!("[{host}]:50051") } else { format!("{host}:50051") }
}

fn port(digits: &str) -> Result<u16, String> {
    digits.parse().map_err(|_| format!("{digits:?} is not a port; a port is a number from 0 to 65535"))
}

/// [`parse_listen`] for serde, for configuration files.
pub fn deserialize_listen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| parse_listen(&text).map_err(serde::de::Error::custom)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_an_address() {
        for (text, address) in [
            ("127.0.0.1:23001", "127.0.0.1:23001"),
            (" 0.0.0.0:1 ", "0.0.0.0:1"),
            ("[::1]:23001", "[::1]:23001"),
            (":23001", "127.0.0.1:23001"),
            ("23001", "127.0.0.1:23001"),
            ("localhost:0", "127.0.0.1:0"),
        ] {
            assert_eq!(parse_listen(text), Ok(address.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_told_with_what_is_missing() {
        for (text, part) in [
            ("localhost", "localhost:50051"),
            ("0.0.0.0", "0.0.0.0:50051"),
            ("::1", "[::1]:50051"),
            ("http://127.0.0.1:1", "scheme"),
            (":70000", "not a port"),
            ("localhost:http", "not a port"),
            ("no.such.host.invalid:1", "cannot find host"),
            ("", "no port"),
        ] {
            let error = parse_listen(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
