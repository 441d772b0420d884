//! The README keeps its word: every command in it runs, in its order, as a stranger would type it.

use std::path::Path;
use std::time::Duration;

use absurd_tests::{Absurd, Database, binary, root};
use tokio::process::Command;

/// Some commands build first, and the machine may be busy.
const LONGEST: Duration = Duration::from_secs(600);

fn shell(line: &str, variables: &[(&str, String)]) -> Command {
    let mut command = Command::new("sh");
    // Nothing of this test's own, and nothing that cargo tells it, which would have everything built anew.
    let own = |name: &str| ["ABSURD_", "CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.starts_with(prefix));
    for (name, _) in std::env::vars().filter(|(name, _)| own(name)) {
        command.env_remove(name);
    }
    command.args(["-euc", line]).current_dir(root()).kill_on_drop(true).stdin(std::process::Stdio::null());
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
}

/// The lines of the README's shell blocks, comments and continuations taken away.
fn commands() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let joined: String = blocks.collect::<String>().replace("\\\n", " ");
    let lines = joined.lines().map(|line| line.split("  #").next().unwrap_or_default().trim().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

/// A measurement with so few samples that it only shows that it works.
fn shrunk(line: &str) -> Option<String> {
    if line.starts_with("absurd bench latency") {
        return Some(format!("{line} --samples 5 --warm-up 0"));
    }
    if line.starts_with("absurd bench rpcs") {
        return Some(format!("{line} --samples 2 --warm-up 0"));
    }
    for (bench, few) in [("drain", "--tasks 20"), ("steady", "--time 200ms"), ("steps", "--tasks 3")] {
        if line.starts_with(&format!("absurd bench {bench}")) {
            return Some(format!("{line} {few}"));
        }
    }
    let line = line.strip_prefix("absurd bench idle")?;
    Some(format!("absurd bench idle{} --time 1s", line.replace("000", "0")))
}

/// Commands that one test runs, in their order. Each command is of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// First steps, and a server for real.
    Steps,
    /// Measurements that are at work all the time.
    Figures,
    /// Measurements that mostly wait.
    Idle,
}

impl Kind {
    fn of(line: &str) -> Self {
        if line.starts_with("absurd bench idle") {
            Self::Idle
        } else if line.starts_with("absurd bench") {
            Self::Figures
        } else {
            Self::Steps
        }
    }
}

/// A terminal in which a stranger types.
struct Terminal {
    /// The server that the other commands speak to.
    dev: Option<Absurd>,
    variables: Vec<(&'static str, String)>,
    home: tempfile::TempDir,
}

impl Terminal {
    fn open() -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
        Self { dev: None, variables: vec![("PATH", path)], home }
    }

    /// Starts the server by a command, and exports what it prints.
    async fn start(&mut self, line: &str) {
        let data = self.home.path().join("data");
        let own = format!("exec {line} --listen 127.0.0.1:0 --data-dir {}", data.display());
        let mut server = Absurd::start(shell(&own, &self.variables));
        let url = server.line("gRPC ").await.split_whitespace().nth(1).unwrap().to_owned();
        let export = server.line("export ABSURD_DATABASE_URL=").await;
        self.variables.push(("ABSURD_URL", url));
        self.variables.push(("ABSURD_DATABASE_URL", export.split('\'').nth(1).unwrap().to_owned()));
        self.dev = Some(server);
    }

    /// Starts another server as for real, and stops it.
    async fn serve(&self, line: &str) {
        let database = Database::empty().await;
        let own = line.replace("postgresql://app@db/app", "$DATABASE").replace("0.0.0.0:50051", "127.0.0.1:0");
        let variables = [&self.variables[..1], &[("DATABASE", database.url().into())]].concat();
        let mut server = Absurd::start(shell(&format!("exec {own}"), &variables));
        server.line("serving").await;
        server.signal("TERM");
        assert_eq!(server.exit_code().await, Some(0), "{line}");
    }

    async fn run(&self, line: &str) {
        let mut command = shell(&shrunk(line).unwrap_or_else(|| line.to_owned()), &self.variables);
        let output = tokio::time::timeout(LONGEST, command.output()).await.expect(line).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}\n{text}");
        if line.contains("first_task") {
            assert!(text.contains("hello world"), "{line}\n{text}");
        }
    }

    async fn enter(&mut self, line: &str) {
        if line == "tests/tour" || line == "tests/run" {
            // These two are what runs this test.
            assert!(root().join(line).exists() && in_ci(line), "{line} is not run by .ci/run");
        } else if line == "cargo run -- dev" {
            // It may have to be built first, beside whatever else the machine does.
            let building = shell("cargo build --quiet", &self.variables).status();
            assert!(tokio::time::timeout(LONGEST, building).await.expect("it is built").unwrap().success());
            self.start(line).await;
        } else if line.starts_with("absurd serve") {
            self.serve(line).await;
        } else if !line.starts_with("export PATH=") {
            self.run(line).await;
        }
    }

    /// Stops the server by Ctrl-C.
    async fn close(self) {
        let dev = self.dev.expect("the README starts a server");
        dev.signal("INT");
        assert_eq!(dev.exit_code().await, Some(0));
    }
}

/// Runs the README's commands of one kind.
async fn run_all(kind: Kind) {
    let commands = commands();
    assert!(commands.len() > 12, "{commands:?}");
    let own: Vec<&str> = commands.iter().map(String::as_str).filter(|line| Kind::of(line) == kind).collect();
    assert!(!own.is_empty(), "no {kind:?} in {commands:?}");
    let mut terminal = Terminal::open();
    if kind != Kind::Steps {
        // The steps have brought a server before; this is the one that they would leave running.
        terminal.start("absurd dev").await;
    }
    for line in own {
        terminal.enter(line).await;
    }
    terminal.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_readme_runs() {
    run_all(Kind::Steps).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_measurement_of_the_readme_runs() {
    run_all(Kind::Figures).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_measurement_of_idle_streams_runs() {
    run_all(Kind::Idle).await;
}

fn in_ci(command: &str) -> bool {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap_or_default();
    let runs = |script: &str| read(script).lines().any(|line| line.trim().starts_with(command));
    runs(".ci/run") || runs("tests/run")
}

/// Every page and example that the documents link to exists.
#[test]
fn no_link_leads_nowhere() {
    let pages = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let top = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docker/README.md"].map(|page| root().join(page));
    for page in pages.chain(top).filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            let found = link.starts_with("https:") || page.parent().unwrap_or(Path::new("/")).join(target).exists();
            assert!(found, "{}: {link}", page.display());
        }
    }
}

/// The guide to durable execution says of every rule where it is tested: these tests exist.
#[test]
fn the_tests_that_the_guide_names_exist() {
    let read = |path: &Path| std::fs::read_to_string(root().join(path)).unwrap_or_default();
    let guide = read(Path::new("docs/durable.md"));
    let sources = |directory: &str| -> String {
        let files = std::fs::read_dir(root().join(directory)).unwrap();
        files.map(|file| read(&file.unwrap().path())).collect()
    };
    let client = sources("client/src/durable");
    let mut seen = 0;
    for row in guide.lines().filter(|line| line.starts_with("| ")) {
        let tests = row.trim_end_matches([' ', '|']).rsplit('|').next().unwrap_or_default();
        for test in tests.split('`').skip(1).step_by(2).filter(|test| test.contains('_')) {
            let (module, name) = test.rsplit_once("::").unwrap_or(("", test));
            let text = if module.is_empty() {
                client.clone()
            } else {
                read(Path::new(&format!("tests/it/{}.rs", module.replace("::", "/"))))
            };
            assert!(text.contains(&format!("fn {name}(")), "{test} does not exist");
            seen += 1;
        }
    }
    assert!(seen > 50, "{seen}");
}
