//! Every wrong key, value and type, in flags, environment, TOML, URLs and passfiles: an error that names it, and no password.

use std::collections::BTreeMap;

use absurd_tests::{Database, absurd, in_time};
use tokio::process::Command;

const CANARY: &str = "c4n4ry";

/// What a command said, and whether it succeeded.
async fn said(command: &mut Command) -> (bool, String) {
    for name in ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGPASSWORD", "PGSERVICE", "PGOPTIONS"] {
        if !command.as_std().get_envs().any(|(known, _)| known == name) {
            command.env_remove(name);
        }
    }
    let output = in_time(&format!("{command:?}"), command.output()).await.unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// The settings of `absurd serve`: name of the flag, name of its variable, kind of its value.
async fn settings() -> BTreeMap<String, (String, String)> {
    let (_, help) = said(absurd(&["serve", "--help"]).env("COLUMNS", "100")).await;
    let mut settings = BTreeMap::new();
    for part in help.split("\n      --").skip(1) {
        let part = part.split_whitespace().collect::<Vec<_>>().join(" ");
        let name = part.split([' ', '[', '=']).next().unwrap().to_owned();
        let kind = part.split_once('<').map_or("", |(_, kind)| kind.split('>').next().unwrap()).to_owned();
        let Some((_, variable)) = part.split_once("[env: ") else { continue };
        settings.insert(name, (variable.split(['=', ']']).next().unwrap().to_owned(), kind));
    }
    settings.remove("config");
    settings
}

/// A value that a setting of a kind cannot have.
fn wrong(name: &str, kind: &str) -> String {
    match kind {
        "URL" => format!("mysql://app:{CANARY}@h/d"),
        "FILTER" => "a=b=c".into(),
        "FILE" => "/nowhere/absurd.pem".into(),
        // Other than a truth, a number, a span, an address.
        _ if name == "listen" || name == "metrics-listen" => "no address".into(),
        _ => "perhaps".into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_value_is_named_and_no_password_is_shown() {
    let settings = settings().await;
    assert!(settings.len() > 30, "{settings:?}");
    let home = tempfile::tempdir().unwrap();
    let good = format!("postgresql://app:{CANARY}@127.0.0.1:1/d");
    for (name, (variable, kind)) in &settings {
        let value = wrong(name, kind);
        let is_url = kind == "URL";
        let is_text = is_url || ["FILTER", "FILE"].contains(&kind.as_str());
        let quoted = if is_text { format!("'{value}'") } else { "['perhaps']".into() };
        let file = home.path().join(format!("{name}.toml"));
        let url = if name == "database-url" { String::new() } else { format!("database_url = '{good}'\n") };
        std::fs::write(&file, format!("# comment\n{url}{} = {quoted}\n", name.replace('-', "_"))).unwrap();
        let mut flags = absurd(&["serve"]);
        flags.arg(format!("--{name}={value}"));
        let mut environment = absurd(&["serve"]);
        environment.env(variable, &value);
        for command in [&mut flags, &mut environment] {
            if name != "database-url" {
                command.env("ABSURD_DATABASE_URL", &good);
            }
        }
        let mut toml = absurd(&["serve", "--config", file.to_str().unwrap()]);
        for (source, command) in [("flag", &mut flags), ("environment", &mut environment), ("file", &mut toml)] {
            // Files that belong together: the others exist.
            for (other, (variable, _)) in settings.iter().filter(|(_, (_, other))| kind == "FILE" && other == "FILE") {
                if other != name {
                    command.env(variable, &file);
                }
            }
            let (well, text) = said(command).await;
            let named = if is_url { text.contains("database URL is not valid") } else { text.contains(name.as_str()) };
            assert!(!well && (named || kind == "FILTER" && text.contains("log:")), "{source} {name}: {text}");
            let cause = kind != "FILE" || text.contains(&format!("{name}: cannot read {value}: No such file"));
            assert!(cause && !text.contains(CANARY), "{source} {name}: {text}");
            let place = source != "file" || is_text || text.contains(", line ");
            assert!(place, "{source} {name}: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_wrong_shows_no_line_of_it() {
    let home = tempfile::tempdir().unwrap();
    let url = format!("postgresql://app:{CANARY}@127.0.0.1:1/d");
    for (text, parts) in [
        (format!("databse-url = \"{url}\""), vec!["line 1", "\"databse-url\"", "did you mean \"database-url\"?"]),
        (
            format!("listen = \"127.0.0.1:0\"\ndatabase_url = [\"{url}\"]"),
            vec!["line 2", "database-url must be a text"],
        ),
        (format!("database_url = \"{url}\"\ndatabase-url = \"{url}\""), vec!["\"database-url\" is set twice"]),
        (format!("database-url = {url}"), vec!["line 1", "not TOML"]),
        (format!("\n\ndatabase-url = \"{url}"), vec!["line 3", "not TOML"]),
        (format!("database-url = \"{url}\" \"{CANARY}\""), vec!["line 1", "not TOML"]),
        (format!("{CANARY} = 1\n{CANARY} = 2\ndatabase-url = \"{url}\""), vec!["line 2", "not TOML"]),
        (format!("[server]\ndatabase-url = \"{url}\""), vec!["line 1", "\"server\""]),
        (format!("database-url = \"{url}?{CANARY}=1\""), vec!["names an option that there is not"]),
        (format!("database-url = \"{url}?sslmode={CANARY}\""), vec!["sslmode must be"]),
        (format!("database-url = \"host=127.0.0.1 password=my {CANARY}\""), vec!["no ="]),
        (format!("database-url = \"{url}\"\nlog = \"trace\""), vec!["refused"]),
        (format!("database_url = \"{url}\"\nmax-batch = \"{url}\""), vec!["line 2", "max-batch"]),
    ] {
        let file = home.path().join("absurd.toml");
        std::fs::write(&file, &text).unwrap();
        let (well, said) = said(&mut absurd(&["serve", "--config", file.to_str().unwrap()])).await;
        assert!(!well && !said.contains(CANARY), "{text}\n{said}");
        for part in parts {
            assert!(said.contains(part), "no {part:?} for\n{text}\nin\n{said}");
        }
    }
    let bare = format!("postgresql://app:{CANARY}@h/d");
    for args in [vec!["migrate", &bare], vec!["serve", &bare, "--log", "debug"], vec!["serve", "--listen", &bare]] {
        let (well, said) = said(&mut absurd(&args)).await;
        assert!(!well && !said.contains(CANARY), "{args:?}: {said}");
    }
}

/// Variables of the environment, and a database URL beside them; none: the environment stands alone.
type Case<'a> = (Vec<(&'a str, &'a str)>, Option<&'a str>);

/// Whatever libpq's own client makes of the environment, the program makes of it too.
#[tokio::test(flavor = "multi_thread")]
async fn the_environment_of_libpq_means_what_it_means_to_psql() {
    let database = Database::new().await;
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let Some(tokio_postgres::config::Host::Unix(socket)) = config.get_hosts().first() else { panic!("a socket") };
    let (socket, name) = (socket.display().to_string(), database.name().to_owned());
    let home = tempfile::tempdir().unwrap();
    let services = home.path().join("services");
    std::fs::write(
        &services,
        format!("[app]\nhost={socket}\nuser=absurd\ndbname={name}\n[bad]\nhost={socket}\nuser=nobody\n"),
    )
    .unwrap();
    let services = services.display().to_string();
    let place = [("PGHOST", socket.as_str()), ("PGUSER", "absurd"), ("PGDATABASE", name.as_str())];
    let service = |name| [("PGSERVICEFILE", services.as_str()), ("PGSERVICE", name)];
    let cases: Vec<Case<'_>> = vec![
        (place.to_vec(), None),
        (vec![place[0], place[1]], Some("dbname=nowhere")),
        (vec![place[1], place[2]], Some("host=/nowhere")),
        (service("app").to_vec(), None),
        (service("bad").to_vec(), None),
        (service("none").to_vec(), None),
        ([service("bad").to_vec(), vec![place[2]]].concat(), Some("user=absurd")),
        ([place.to_vec(), vec![("PGPORT", "1")]].concat(), None),
        ([place.to_vec(), vec![("PGPORT", "x")]].concat(), None),
        ([place.to_vec(), vec![("PGSSLMODE", "disable")]].concat(), None),
        ([place.to_vec(), vec![("PGSSLMODE", "sometimes")]].concat(), None),
        ([place.to_vec(), vec![("PGTARGETSESSIONATTRS", "read-write")]].concat(), None),
        ([place.to_vec(), vec![("PGTARGETSESSIONATTRS", "never")]].concat(), None),
        ([place.to_vec(), vec![("PGCONNECT_TIMEOUT", "3")]].concat(), None),
        ([place.to_vec(), vec![("PGOPTIONS", "-c nosuch=1")]].concat(), None),
        ([place.to_vec(), vec![("PGAPPNAME", "x")]].concat(), Some("")),
    ];
    for (variables, url) in cases {
        let mut ours = absurd(&["migrate", "--check"]);
        let mut theirs = Command::new("psql");
        theirs.args(["-X", "-w", "-c", "select 1"]).kill_on_drop(true);
        if let Some(url) = url {
            theirs.args(["-d", url]);
            ours.args(["--database-url", url]);
        }
        for command in [&mut ours, &mut theirs] {
            command.envs(variables.iter().copied()).env("HOME", home.path());
        }
        let ((ours, our_text), (theirs, their_text)) = (said(&mut ours).await, said(&mut theirs).await);
        assert_eq!(ours, theirs, "{variables:?} {url:?}:\n{our_text}\n{their_text}");
    }
    let (well, text) = said(&mut absurd(&["migrate", "--check"])).await;
    assert!(!well && text.contains("ABSURD_DATABASE_URL") && text.contains("PGHOST"), "{text}");
}
