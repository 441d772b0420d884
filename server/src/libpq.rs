//! Resolves the address of the database like libpq: from a URL or `key=value` text, a service file, the environment and
//! a passfile. An earlier source wins over a later one. Errors repeat no value, because any value may hold a password;
//! they may repeat a service's name, a file's path, and keywords such as `require`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tokio_postgres::Config;

/// The options of libpq that are used, each with its environment variable.
const OPTIONS: &[(&str, &str)] = &[
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("dbname", "PGDATABASE"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("service", "PGSERVICE"),
    ("options", "PGOPTIONS"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("sslmode", "PGSSLMODE"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    ("gssencmode", "PGGSSENCMODE"),
    ("tcp_user_timeout", ""),
    ("keepalives", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("keepalives_retries", ""),
];
/// Options of libpq that are ignored, mostly because the server sets its own name and encoding, and connects without
/// TLS.
const IGNORED: &[&str] = &[
    "application_name",
    "fallback_application_name",
    "client_encoding",
    "sslcert",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "sslsni",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "keepalives_count",
    "requirepeer",
    "require_auth",
];
/// Directories that are searched for Postgres' Unix sockets.
const SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];
const NO_TLS: &str = "connections to Postgres are made without TLS for now";

type Parts = BTreeMap<String, String>;

/// A fault in a database's address. Its text holds no password.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Problem(String);

fn problem<T>(text: impl Into<String>) -> Result<T, Problem> {
    Err(Problem(text.into()))
}

/// The environment variables of a process or of a test.
pub struct Environment<'a> {
    /// Reads a variable; `None`: it is not set.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
}

impl std::fmt::Debug for Environment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Environment(..)")
    }
}

impl Environment<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    fn home(&self, file: &str) -> Option<PathBuf> {
        self.get("HOME").map(|home| Path::new(&home).join(file))
    }

    /// Whether it sets `PGHOST`, `PGHOSTADDR`, `PGDATABASE` or `PGSERVICE`.
    pub fn names_a_database(&self) -> bool {
        ["PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE"].iter().any(|name| self.get(name).is_some())
    }
}

/// A resolved address, with warnings for its owner.
#[derive(Debug)]
pub struct Resolved {
    /// How to connect; its password is never printed.
    pub config: Config,
    /// Sources that were skipped, such as a passfile that others can read.
    pub warnings: Vec<String>,
}

/// Resolves a database's address; `None`: from the environment alone.
pub fn resolve(text: Option<&str>, environment: &Environment<'_>) -> Result<Resolved, Problem> {
    let mut parts = text.map_or_else(|| Ok(Parts::new()), |text| parse(text.trim()))?;
    let service = parts.remove("service").or_else(|| environment.get("PGSERVICE"));
    if let Some(service) = service {
        for (name, value) in service_parts(&service, environment)? {
            parts.entry(name).or_insert(value);
        }
    }
    for (name, variable) in OPTIONS.iter().filter(|(name, variable)| *name != "service" && !variable.is_empty()) {
        if !parts.contains_key(*name)
            && let Some(value) = environment.get(variable)
        {
            parts.insert((*name).to_owned(), value);
        }
    }
    for name in IGNORED {
        parts.remove(*name);
    }
    // A socket has no address: `hostaddr`, such as one from the environment, belongs to another host.
    if parts.get("host").is_some_and(|host| host.starts_with('/')) {
        parts.remove("hostaddr");
    }
    refuse_tls(&mut parts)?;
    let passfile = parts.remove("passfile");
    let user = parts.entry("user".into()).or_insert_with(|| whoami::username().unwrap_or_else(|_| "postgres".into()));
    let user = user.clone();
    let database = parts.entry("dbname".into()).or_insert(user.clone()).clone();
    if !parts.contains_key("host") && !parts.contains_key("hostaddr") {
        let port = parts.get("port").map_or("5432", String::as_str);
        let local = SOCKET_DIRS.iter().find(|dir| Path::new(dir).join(format!(".s.PGSQL.{port}")).exists());
        parts.insert("host".into(), (*local.unwrap_or(&"localhost")).to_owned());
    }
    let mut warnings = Vec::new();
    if !parts.contains_key("password") {
        let path = passfile.map(PathBuf::from).or_else(|| environment.home(".pgpass"));
        if let Some(text) = path.and_then(|path| passfile_text(&path, &mut warnings)) {
            let password = places(&parts).iter().find_map(|(host, port)| {
                lookup(&text, &[host.as_str(), port.as_str(), database.as_str(), user.as_str()])
            });
            if let Some(password) = password {
                parts.insert("password".into(), password);
            }
        }
    }
    Ok(Resolved { config: config(&parts)?, warnings })
}

fn refuse_tls(parts: &mut Parts) -> Result<(), Problem> {
    match parts.remove("sslmode").as_deref() {
        None | Some("disable" | "allow" | "prefer") => {}
        Some(mode @ ("require" | "verify-ca" | "verify-full")) => {
            return problem(format!("sslmode={mode} asks for TLS, and {NO_TLS}; sslmode=disable or prefer works"));
        }
        Some(_) => return problem("sslmode must be disable, allow, prefer, require, verify-ca or verify-full"),
    }
    match parts.remove("channel_binding").as_deref() {
        None | Some("disable" | "prefer") => {}
        Some("require") => {
            return problem(format!(
                "channel_binding=require needs TLS, and {NO_TLS}; channel_binding=disable or prefer works"
            ));
        }
        Some(_) => return problem("channel_binding must be disable, prefer or require"),
    }
    match parts.remove("gssencmode").as_deref() {
        None | Some("disable" | "prefer") => Ok(()),
        Some(_) => problem("gssencmode must be disable or prefer: connections to Postgres are not encrypted by GSSAPI"),
    }
}

/// The driver's configuration. Each value is checked by itself, so that an error can name the option without the value.
fn config(parts: &Parts) -> Result<Config, Problem> {
    let mut all = String::new();
    for (name, value) in parts {
        let value = match (name.as_str(), value.as_str()) {
            ("target_session_attrs", "primary") => "read-write",
            ("target_session_attrs", "any" | "read-write" | "read-only") => value,
            ("target_session_attrs", _) => {
                return problem("target_session_attrs must be any, primary, read-write or read-only");
            }
            _ => value,
        };
        let one = format!("{name}='{}' ", value.replace('\\', "\\\\").replace('\'', "\\'"));
        if one.parse::<Config>().is_err() {
            return problem(format!("{name} has a value that it cannot have"));
        }
        all.push_str(&one);
    }
    let config = all.parse().map_err(|_| Problem("its parts do not go together".into()))?;
    let count = |name: &str| parts.get(name).map_or(0, |value| value.split(',').count());
    if count("port") > 1 && count("port") != count("host").max(count("hostaddr")) {
        return problem("port must name one port, or as many as there are hosts");
    }
    Ok(config)
}

/// The hosts and ports by which a passfile names the address.
fn places(parts: &Parts) -> Vec<(String, String)> {
    let list = |name: &str| parts.get(name).map(|value| value.split(',').map(str::to_owned).collect::<Vec<_>>());
    let hosts = list("host").or_else(|| list("hostaddr")).unwrap_or_default();
    let ports = list("port").unwrap_or_default();
    let place = |(index, host): (usize, String)| {
        let port = ports.get(index).or_else(|| ports.first()).filter(|port| !port.is_empty());
        let host = if host.is_empty() || SOCKET_DIRS.contains(&host.as_str()) { "localhost".into() } else { host };
        (host, port.cloned().unwrap_or_else(|| "5432".into()))
    };
    hosts.into_iter().enumerate().map(place).collect()
}

/// Parses `postgresql://...` or `key=value ...`.
fn parse(text: &str) -> Result<Parts, Problem> {
    if let Some(rest) = text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        parse_url(rest)
    } else if text.contains("://") {
        problem("it does not begin with postgresql://")
    } else {
        parse_pairs(text)
    }
}

fn known(name: &str) -> Result<String, Problem> {
    if OPTIONS.iter().any(|(known, _)| *known == name) || IGNORED.contains(&name) {
        return Ok(name.to_owned());
    }
    problem("it names an option that there is not")
}

fn parse_url(rest: &str) -> Result<Parts, Problem> {
    let mut parts = Parts::new();
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (place, database) = rest.split_once('/').map_or((rest, None), |(place, name)| (place, Some(name)));
    let (login, places) = place.rsplit_once('@').map_or((None, place), |(login, places)| (Some(login), places));
    if let Some(login) = login {
        let (user, password) = login.split_once(':').map_or((login, None), |(user, word)| (user, Some(word)));
        if !user.is_empty() {
            parts.insert("user".into(), decoded(user)?);
        }
        if let Some(password) = password.filter(|password| !password.is_empty()) {
            parts.insert("password".into(), decoded(password)?);
        }
    }
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for place in places.split(',').filter(|_| !places.is_empty()) {
        let (host, port) = match place.strip_prefix('[') {
            Some(v6) => {
                let Some((host, rest)) = v6.split_once(']') else { return problem("it has a [ without a ]") };
                if !rest.is_empty() && !rest.starts_with(':') {
                    return problem("it has more after ] than a port");
                }
                (host, rest.strip_prefix(':').unwrap_or(""))
            }
            None => place.split_once(':').unwrap_or((place, "")),
        };
        hosts.push(decoded(host)?);
        ports.push(decoded(port)?);
    }
    if hosts.iter().any(|host| !host.is_empty()) {
        parts.insert("host".into(), hosts.join(","));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        let ports: Vec<&str> = ports.iter().map(|port| if port.is_empty() { "5432" } else { port }).collect();
        parts.insert("port".into(), ports.join(","));
    }
    if let Some(database) = database.filter(|database| !database.is_empty()) {
        parts.insert("dbname".into(), decoded(database)?);
    }
    for pair in query.into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty()) {
        let Some((name, value)) = pair.split_once('=') else { return problem("an option in it has no value") };
        // The spelling of JDBC, which libpq accepts too.
        if name == "ssl" && value == "true" {
            parts.insert("sslmode".into(), "require".into());
            continue;
        }
        parts.insert(known(&decoded(name)?)?, decoded(value)?);
    }
    Ok(parts)
}

/// Decodes percent escapes, such as `%41`. Refuses `%00`.
fn decoded(text: &str) -> Result<String, Problem> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) if high + low > 0 => bytes.push(u8::try_from(high * 16 + low).unwrap_or(b'?')),
            _ => return problem("it has a % that two hexadecimal digits do not follow; write % itself as %25"),
        }
    }
    String::from_utf8(bytes).map_err(|_| Problem("it holds bytes that are no UTF-8".into()))
}

fn parse_pairs(text: &str) -> Result<Parts, Problem> {
    let mut parts = Parts::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((name, after)) = rest.split_once('=') else { return problem("a part of it has no =") };
        let name = name.trim_end();
        if name.contains(char::is_whitespace) {
            return problem("a part of it has no =; a value with blanks is written in single quotes");
        }
        let name = known(name)?;
        let (value, after) = pair_value(after.trim_start())?;
        parts.insert(name, value);
        rest = after.trim_start();
    }
    Ok(parts)
}

fn pair_value(text: &str) -> Result<(String, &str), Problem> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut rest = text.char_indices().skip(usize::from(quoted));
    while let Some((at, next)) = rest.next() {
        match next {
            '\\' => value.extend(rest.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            blank if !quoted && blank.is_whitespace() => return Ok((value, &text[at..])),
            other => value.push(other),
        }
    }
    if quoted { problem("a quoted value in it does not end") } else { Ok((value, "")) }
}

/// The section of a service, from the user's service file, else from the system's.
fn service_parts(service: &str, environment: &Environment<'_>) -> Result<Parts, Problem> {
    let own = environment.get("PGSERVICEFILE").map(PathBuf::from).or_else(|| environment.home(".pg_service.conf"));
    let shared = environment.get("PGSYSCONFDIR").map(|dir| Path::new(&dir).join("pg_service.conf"));
    for path in own.into_iter().chain(shared) {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if let Some(parts) = section(&text, service, &path)? {
            return Ok(parts);
        }
    }
    problem(format!("service {service:?} is in no service file (PGSERVICEFILE, ~/.pg_service.conf)"))
}

fn section(text: &str, service: &str, path: &Path) -> Result<Option<Parts>, Problem> {
    let mut found: Option<Parts> = None;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            if name.strip_suffix(']') == Some(service) {
                found = Some(Parts::new());
            }
            continue;
        }
        let Some(parts) = &mut found else { continue };
        let place = || format!("{}, line {}", path.display(), index + 1);
        let Some((name, value)) = line.split_once('=') else { return problem(format!("{}: there is no =", place())) };
        if name.trim() == "service" {
            return problem(format!("{}: a service cannot name another one", place()));
        }
        let name = known(name.trim()).map_err(|problem| Problem(format!("{}: {problem}", place())))?;
        parts.entry(name).or_insert_with(|| value.trim().to_owned());
    }
    Ok(found)
}

/// The text of a passfile. Like libpq, skips a file that others can read; adds a warning.
fn passfile_text(path: &Path, warnings: &mut Vec<String>) -> Option<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let facts = std::fs::metadata(path).ok()?;
    if !facts.is_file() {
        warnings.push(format!("{} is not a plain file and is not read for passwords", path.display()));
        return None;
    }
    if facts.permissions().mode() & 0o077 != 0 {
        warnings.push(format!("{} can be read by others and is not read for passwords: chmod 600", path.display()));
        return None;
    }
    std::fs::read_to_string(path).ok()
}

/// The password in the first line that matches host, port, database and user.
fn lookup(text: &str, wanted: &[&str; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = fields(line);
        let [patterns @ .., password] = fields.get(..5)? else { return None };
        let fits = |(pattern, wanted): (&(String, bool), &&str)| pattern.1 || pattern.0 == **wanted;
        patterns.iter().zip(wanted).all(fits).then(|| password.0.clone())
    })
}

/// The fields of a passfile's line, and whether each is a wildcard. The password ends at the next colon.
fn fields(line: &str) -> Vec<(String, bool)> {
    let mut fields = vec![String::new()];
    let mut escaped = vec![false];
    let mut rest = line.chars();
    while let Some(next) = rest.next() {
        let (Some(field), Some(was_escaped)) = (fields.last_mut(), escaped.last_mut()) else { break };
        match next {
            '\\' => {
                *was_escaped = true;
                field.extend(rest.next());
            }
            ':' => {
                fields.push(String::new());
                escaped.push(false);
            }
            other => field.push(other),
        }
    }
    fields.into_iter().zip(escaped).map(|(field, escaped)| (field.clone(), field == "*" && !escaped)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio_postgres::config::Host;

    use super::*;

    fn resolved(text: Option<&str>, variables: &[(&str, &str)]) -> Result<Resolved, Problem> {
        let variable =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        resolve(text, &Environment { variable: &variable })
    }

    /// Host, port, database, user and password of a configuration.
    fn told(config: &Config) -> String {
        let host = match config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => "-".into(),
        };
        let password = config.get_password().map_or("-".into(), String::from_utf8_lossy);
        let port = config.get_ports().first().map_or("-".into(), u16::to_string);
        format!("{host} {port} {} {} {password}", config.get_dbname().unwrap_or("-"), config.get_user().unwrap_or("-"))
    }

    #[test]
    fn urls_and_pairs_are_read_as_libpq_reads_them() {
        for (text, expected) in [
            ("postgresql://me:p%40w@h:6000/d", "h 6000 d me p@w"),
            ("postgres://me@[::1]:6000/d\n", "::1 6000 d me -"),
            ("postgresql://me@%2Fvar%2Frun/d", "/var/run - d me -"),
            ("postgresql://me@h?password=a%26b", "h - me me a&b"),
            ("postgresql:///d?host=/tmp&user=me", "/tmp - d me -"),
            ("postgresql://me@one:1,two:2/d", "one 1 d me -"),
            ("postgresql://me@one,two:2/d", "one 5432 d me -"),
            ("  host=h  port = 5 dbname='my d' user=me password='it\\'s' ", "h 5 my d me it's"),
            ("host=h user=me password=a\\ b", "h - me me a b"),
            ("host=h user=me application_name=x sslrootcert=/x sslmode=prefer", "h - me me -"),
        ] {
            assert_eq!(told(&resolved(Some(text), &[]).unwrap().config), expected, "{text}");
        }
    }

    #[test]
    fn each_source_fills_what_the_ones_before_it_leave_open() {
        let home = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str, mode: u32| {
            let path = home.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path.display().to_string()
        };
        let services =
            write("services", "# ours\n[other]\nhost=no\n\n[app]\nhost = s\nport=7\nuser=sam\n[app]\nhost=x\n", 0o644);
        let passes = write("passes", "# h\nh:*:d:me:word\\:one\ns:7:*:sam:two\n*:*:*:*:any\n", 0o600);
        let open = write("open", "*:*:*:*:any\n", 0o644);
        let of = |text: Option<&str>, variables: &[(&str, &str)]| {
            let always = [("PGSERVICEFILE", services.as_str()), ("PGPASSFILE", passes.as_str())];
            let variables: Vec<_> = variables.iter().copied().chain(always).collect();
            told(&resolved(text, &variables).unwrap().config)
        };
        assert_eq!(of(Some("host=h dbname=d user=me"), &[]), "h - d me word:one");
        assert_eq!(of(Some("host=h dbname=d user=me"), &[("PGPASSWORD", "env")]), "h - d me env");
        assert_eq!(of(Some("host=h dbname=d user=me password=own"), &[("PGPASSWORD", "env")]), "h - d me own");
        assert_eq!(of(Some("service=app"), &[("PGHOST", "e"), ("PGPORT", "9"), ("PGDATABASE", "d")]), "s 7 d sam two");
        assert_eq!(of(Some("service=app host=h"), &[("PGDATABASE", "d")]), "h 7 d sam any");
        assert_eq!(of(None, &[("PGSERVICE", "app"), ("PGUSER", "x")]), "s 7 sam sam two");
        assert_eq!(of(None, &[("PGHOST", "e"), ("PGUSER", "x"), ("PGPASSWORD", "p")]), "e - x x p");
        assert_eq!(of(Some("host=h dbname=x user=me"), &[("PGHOST", "e")]), "h - x me any");
        let unread = resolved(Some("host=h user=me"), &[("PGPASSFILE", &open)]).unwrap();
        assert_eq!(told(&unread.config), "h - me me -");
        assert!(unread.warnings[0].contains("chmod 600"), "{:?}", unread.warnings);
        let missing = resolved(Some("service=nope"), &[("PGSERVICEFILE", &services)]).unwrap_err();
        assert!(missing.to_string().contains("\"nope\" is in no service file"), "{missing}");
        let broken = write("broken", "[app]\nhost=h\nhots=x\n", 0o644);
        let broken = resolved(Some("service=app"), &[("PGSERVICEFILE", &broken)]).unwrap_err();
        assert!(broken.to_string().ends_with("line 3: it names an option that there is not"), "{broken}");
    }

    #[test]
    fn what_cannot_be_kept_is_refused_in_a_sentence_without_a_value() {
        for (text, expected) in [
            ("postgresql://me:canary@h/d?sslmode=require", "without TLS"),
            ("host=h password=canary sslmode=verify-full", "without TLS"),
            ("host=h password=canary channel_binding=require", "channel_binding=require needs TLS"),
            ("host=h password=canary gssencmode=require", "gssencmode"),
            ("host=h password=canary sslmode=canary", "sslmode must be"),
            ("host=h password=canary port=canary", "port has a value"),
            ("host=h password=canary connect_timeout=canary", "connect_timeout has a value"),
            ("host=h password=canary target_session_attrs=canary", "target_session_attrs must be"),
            ("host=h,i password=canary port=1,2,3", "as many as there are hosts"),
            ("postgresql://me:canary@h:canary/d", "port has a value"),
            ("postgresql://me:canary%@h/d", "%25"),
            ("postgresql://me:canary@[h/d", "a [ without a ]"),
            ("postgresql://me@h/d?canary=x", "an option that there is not"),
            ("postgresql://me@h/d?canary", "has no value"),
            ("mysql://me:canary@h/d", "does not begin with postgresql://"),
            ("host=h password=my canary", "no ="),
            ("host=h password='canary", "does not end"),
            ("canary", "no ="),
        ] {
            let error = resolved(Some(text), &[]).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("canary"), "{text}: {error}");
        }
    }
}
