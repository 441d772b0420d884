//! The `absurd` program as a user runs it, and the Python programs of the tests.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;

use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

/// Root directory of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Path of the program, built from the tested sources.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        // Builds the whole workspace: the program alone would have other features of its dependencies, which would be
        // built again.
        let built = cargo().args(["build", "--quiet", "--workspace", "--bins", "--examples"]).status();
        assert!(built.is_ok_and(|status| status.success()), "cargo build of the absurd program failed");
        // This test runs from target/<profile>/deps; the program was built for the dev profile.
        let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
        target.join("debug/absurd")
    })
}

/// Cargo, at the root of the workspace, without the variables that describe the package of this test. They would make
/// build scripts run again, and all their dependents be rebuilt.
fn cargo() -> std::process::Command {
    let mut command = std::process::Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
    {
        command.env_remove(name);
    }
    command.current_dir(root());
    command
}

/// A command line of the program, without the `ABSURD_` variables of this process.
pub fn absurd(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ABSURD_")) {
        command.env_remove(name);
    }
    command.args(args).kill_on_drop(true).stdin(Stdio::null());
    command
}

/// A program of the Python environment that `tests/setup` prepared.
pub fn tool(name: &str, args: &[&str]) -> Command {
    let program = root().join(".venv/bin").join(name);
    assert!(program.exists(), "run tests/setup first: it prepares {}", program.display());
    let mut command = Command::new(program);
    command.args(args).kill_on_drop(true).stdin(Stdio::null());
    command
}

/// A Python example of the documentation.
pub fn example(script: &str) -> Command {
    let mut command = tool("python", &[]);
    command.arg(root().join("docs/examples").join(script)).env("PYTHONPATH", root().join(".venv/generated"));
    command
}

/// A running program whose lines can be read.
#[derive(Debug)]
pub struct Absurd {
    /// The process, for its pid and its exit status.
    pub child: Child,
    output: Lines<BufReader<ChildStdout>>,
    errors: Lines<BufReader<ChildStderr>>,
}

impl Absurd {
    /// Starts the program and captures both of its output streams.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let errors = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, output, errors }
    }

    /// Waits for the next line, on either stream, that contains `part`.
    pub async fn line(&mut self, part: &str) -> String {
        let mut seen = Vec::new();
        let reading = async {
            let (mut output, mut errors) = (true, true);
            while output || errors {
                let line = tokio::select! {
                    line = self.output.next_line(), if output => { output = matches!(line, Ok(Some(_))); line }
                    line = self.errors.next_line(), if errors => { errors = matches!(line, Ok(Some(_))); line }
                };
                if let Ok(Some(line)) = line {
                    if line.contains(part) {
                        return Some(line);
                    }
                    seen.push(line);
                }
            }
            None
        };
        let found = tokio::time::timeout(crate::PATIENCE, reading).await;
        match found {
            Ok(Some(line)) => line,
            _ => panic!("the program never said {part:?}, but:\n{}", seen.join("\n")),
        }
    }

    /// Sends a signal, named as for `kill`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().expect("the program runs").to_string();
        let sent = std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }

    /// Waits for the end of the process. Returns its exit code.
    pub async fn exit_code(mut self) -> Option<i32> {
        let drained = async { while let Ok(Some(_)) = self.output.next_line().await {} };
        let errors = async {
            while let Ok(Some(line)) = self.errors.next_line().await {
                eprintln!("program: {line}");
            }
        };
        let ((), (), status) =
            crate::in_time("the program ends", async { tokio::join!(drained, errors, self.child.wait()) }).await;
        status.unwrap().code()
    }
}
