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

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_readme_runs() {
    let database = Database::empty().await;
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut variables = vec![("PATH", path)];
    let mut dev = None;
    let commands = commands();
    assert!(commands.len() > 12, "{commands:?}");
    for line in commands {
        if line == "tests/tour" || line == "tests/run" {
            // These two are what runs this test.
            assert!(root().join(&line).exists() && in_ci(&line), "{line} is not run by .ci/run");
        } else if line == "cargo run -- dev" {
            // It may have to be built first, beside whatever else the machine does.
            let building = shell("cargo build --quiet", &variables).status();
            assert!(tokio::time::timeout(LONGEST, building).await.expect("it is built").unwrap().success());
            let data = home.path().join("data");
            let own = format!("exec {line} --listen 127.0.0.1:0 --data-dir {}", data.display());
            let mut server = Absurd::start(shell(&own, &variables));
            let url = server.line("gRPC ").await.split_whitespace().nth(1).unwrap().to_owned();
            let export = server.line("export ABSURD_DATABASE_URL=").await;
            variables.push(("ABSURD_URL", url));
            variables.push(("ABSURD_DATABASE_URL", export.split('\'').nth(1).unwrap().to_owned()));
            dev = Some(server);
        } else if line.starts_with("absurd serve") {
            let own = line.replace("postgresql://app@db/app", "$DATABASE").replace("0.0.0.0:50051", "127.0.0.1:0");
            let mut server = Absurd::start(shell(
                &format!("exec {own}"),
                &[&variables[..1], &[("DATABASE", database.url().into())]].concat(),
            ));
            server.line("serving").await;
            server.signal("TERM");
            assert_eq!(server.exit_code().await, Some(0), "{line}");
        } else if !line.starts_with("export PATH=") {
            let mut command = shell(&shrunk(&line).unwrap_or(line.clone()), &variables);
            let output = tokio::time::timeout(LONGEST, command.output()).await.expect(&line).unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{line}\n{text}");
            if line.contains("first_task") {
                assert!(text.contains("hello world"), "{line}\n{text}");
            }
        }
    }
    let dev = dev.expect("the README starts a server");
    dev.signal("INT");
    assert_eq!(dev.exit_code().await, Some(0));
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
