//! A private Postgres: finds the programs, creates a cluster in a directory, runs it on a socket of its own, and stops
//! it.
//!
//! Guarantees: it touches no other cluster (a lock on the directory, a private socket, no TCP port). It works as root
//! (the programs run as another user). It stops with this process, however this process ends.

mod programs;

use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use programs::{Programs, User};

/// Name of the database and of the role that owns it.
pub const DATABASE: &str = "absurd";
/// Longest path of a socket in bytes.
const SOCKET_PATH_MAX: usize = 100;
/// Longest wait until a cluster accepts connections, including recovery after a crash.
const START_MAX: Duration = Duration::from_secs(60);

/// An error of a cluster; its text says how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No suitable programs were found.
    #[error("{0}")]
    NoPrograms(String),
    /// Another process runs the cluster in this directory.
    #[error("{0} is in use by another absurd; stop that one, or choose another directory with --data-dir")]
    InUse(PathBuf),
    /// The directory cannot be used.
    #[error("cannot use {path}: {problem}; choose another directory with --data-dir")]
    Directory {
        /// Path of the directory or file.
        path: PathBuf,
        /// Text of the system's error.
        problem: String,
    },
    /// A program of Postgres failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Name of the program.
        program: &'static str,
        /// The end of its output.
        output: String,
    },
}

/// Options of a cluster.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Directory of the cluster; created if missing.
    pub home: PathBuf,
    /// Directory of `initdb` and `postgres`; searched for if absent.
    pub bin: Option<PathBuf>,
    /// Whether acknowledged commits survive a crash of the machine. Off for tests only.
    pub durable: bool,
    /// Further settings of Postgres, as `name=value`.
    pub settings: Vec<String>,
}

/// A running cluster. Its drop stops it.
#[derive(Debug)]
pub struct Cluster {
    home: PathBuf,
    socket: PathBuf,
    version: String,
    pid: Pid,
    exited: mpsc::Receiver<io::Result<ExitStatus>>,
    gone: bool,
    /// Lock on the directory, held while the cluster runs.
    _lock: File,
}

/// The default directory of `absurd dev`.
pub fn default_home() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/absurd".into();
    }
    let data = std::env::var_os("XDG_DATA_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from).join(".local/share");
    data.unwrap_or_else(home).join("absurd")
}

impl Cluster {
    /// Starts the cluster in a directory; creates it there first, if it is missing. Blocks until it accepts
    /// connections.
    pub fn start(options: &ClusterOptions) -> Result<Self, Error> {
        let home = prepare_home(&options.home)?;
        let lock = lock(&home)?;
        let data = home.join("data");
        let major = fs::read_to_string(data.join("PG_VERSION")).ok().map(|text| text.trim().to_owned());
        let programs = Programs::find(options.bin.as_deref(), major.as_deref())?;
        let user = User::for_data(&home)?;
        let directory = |problem: io::Error| Error::Directory { path: home.clone(), problem: problem.to_string() };
        if let Some(user) = &user {
            chown(&home, Some(user.uid), Some(user.gid)).map_err(directory)?;
            user.check_reach(&home)?;
        }
        let socket = socket_directory(&home, user.as_ref()).map_err(directory)?;
        if !data.join("PG_VERSION").exists() || home.join("initializing").exists() {
            initialize(&programs, user.as_ref(), &home)?;
        }
        let (pid, exited) = launch(&programs, user.as_ref(), &home, &socket, options)?;
        let mut cluster = Self { home, socket, version: programs.version, pid, exited, gone: false, _lock: lock };
        cluster.wait_until_ready()?;
        Ok(cluster)
    }

    /// Directory of the cluster, without symbolic links.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Version of the programs, such as `15.18`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Process id of the postmaster.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// URL of a database of this cluster. It overrides the environment of any Postgres client.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://{DATABASE}@/{database}?port=5432&host={}", self.socket.display())
    }

    /// Whether Postgres has ended by itself.
    pub fn has_exited(&mut self) -> bool {
        if !self.gone {
            self.gone = !matches!(self.exited.try_recv(), Err(mpsc::TryRecvError::Empty));
        }
        self.gone
    }

    /// Stops Postgres: by SIGINT, after 10 s by SIGQUIT, after 5 s more by SIGKILL.
    pub fn stop(&mut self) {
        let steps = [(Signal::INT, 10), (Signal::QUIT, 5), (Signal::KILL, 5)];
        for (signal, seconds) in steps {
            if self.gone {
                return;
            }
            let _ = kill_process(self.pid, signal);
            let ended = self.exited.recv_timeout(Duration::from_secs(seconds));
            self.gone = !matches!(ended, Err(mpsc::RecvTimeoutError::Timeout));
        }
    }

    fn wait_until_ready(&mut self) -> Result<(), Error> {
        let until = Instant::now() + START_MAX;
        loop {
            if self.has_exited() || Instant::now() > until {
                return Err(Error::Program { program: "postgres", output: log_end(&self.home) });
            }
            // Line 1 holds the process id, line 8 the state.
            let text = fs::read_to_string(self.home.join("data/postmaster.pid")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            let ours = lines.first().is_some_and(|pid| *pid == self.pid().to_string());
            if ours && lines.get(7).is_some_and(|state| matches!(*state, "ready" | "standby")) {
                return Ok(());
            }
            pause(Duration::from_millis(10));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
    }
}

#[allow(clippy::disallowed_methods, reason = "a thread of its own, never the runtime's")]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

fn prepare_home(home: &Path) -> Result<PathBuf, Error> {
    let fail = |problem: io::Error| Error::Directory { path: home.to_owned(), problem: problem.to_string() };
    fs::create_dir_all(home).map_err(fail)?;
    home.canonicalize().map_err(fail)
}

fn lock(home: &Path) -> Result<File, Error> {
    let path = home.join("lock");
    let fail = |problem: io::Error| Error::Directory { path: path.clone(), problem: problem.to_string() };
    let file = File::options().create(true).append(true).open(&path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::InUse(home.to_owned())),
        Err(fs::TryLockError::Error(problem)) => Err(fail(problem)),
    }
}

/// The directory of the socket: beside the data, or in the temporary directory if that path is too long.
fn socket_directory(home: &Path, user: Option<&User>) -> io::Result<PathBuf> {
    let mut socket = home.join("s");
    if socket.as_os_str().len() + "/.s.PGSQL.5432.lock".len() > SOCKET_PATH_MAX {
        let inode = fs::metadata(home)?;
        socket = std::env::temp_dir().join(format!("absurd-{:x}-{:x}", inode.dev(), inode.ino()));
    }
    fs::create_dir_all(&socket)?;
    if let Some(user) = user {
        chown(&socket, Some(user.uid), Some(user.gid))?;
    }
    fs::set_permissions(&socket, Permissions::from_mode(0o700))?;
    Ok(socket)
}

/// Creates the data directory. Replaces one that a crash left unfinished.
fn initialize(programs: &Programs, user: Option<&User>, home: &Path) -> Result<(), Error> {
    let fail = |problem: io::Error| Error::Directory { path: home.to_owned(), problem: problem.to_string() };
    let data = home.join("data");
    let mark = home.join("initializing");
    fs::write(&mark, "").map_err(fail)?;
    if data.exists() {
        fs::remove_dir_all(&data).map_err(fail)?;
    }
    let mut command = Command::new(programs.initdb());
    command
        .args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "--username", DATABASE, "--pgdata"])
        .arg(&data)
        .stdin(Stdio::null());
    run_as(&mut command, user, home);
    let output = command.output().map_err(|error| Error::Program { program: "initdb", output: error.to_string() })?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program { program: "initdb", output });
    }
    // One flush of the file system, instead of one for each of a thousand files.
    let directory = File::open(&data).map_err(fail)?;
    rustix::fs::syncfs(&directory).map_err(|error| fail(error.into()))?;
    fs::remove_file(&mark).map_err(fail)
}

fn run_as(command: &mut Command, user: Option<&User>, home: &Path) {
    command.current_dir(home).env_remove("PGDATA").env_remove("PGPORT").env_remove("PGHOST");
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid);
    }
}

type Launched = (Pid, mpsc::Receiver<io::Result<ExitStatus>>);

/// Starts Postgres from a thread that lives as long as Postgres, because the parent-death signal follows the spawning
/// thread, not the process.
fn launch(
    programs: &Programs,
    user: Option<&User>,
    home: &Path,
    socket: &Path,
    options: &ClusterOptions,
) -> Result<Launched, Error> {
    let fail = |problem: io::Error| Error::Directory { path: home.to_owned(), problem: problem.to_string() };
    let log = File::options().create(true).append(true).open(home.join("postgres.log")).map_err(fail)?;
    let mut command = Command::new(programs.postgres());
    command.arg("-D").arg(home.join("data")).arg("-k").arg(socket);
    for setting in ["listen_addresses=", "unix_socket_permissions=0700", "max_connections=200", "jit=off"] {
        command.args(["-c", setting]);
    }
    let fsync: &[&str] =
        if options.durable { &[] } else { &["fsync=off", "synchronous_commit=off", "full_page_writes=off"] };
    for setting in fsync.iter().copied().chain(options.settings.iter().map(String::as_str)) {
        command.args(["-c", setting]);
    }
    let errors = log.try_clone().map_err(fail)?;
    // A process group of its own: Ctrl-C in the terminal must not stop Postgres before the server has drained.
    command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
    run_as(&mut command, user, home);
    stop_with_parent(&mut command);
    let (tell_pid, pid) = mpsc::channel();
    let (tell_exit, exited) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("postgres".into()).spawn(move || match command.spawn() {
        Ok(mut child) => {
            let _ = tell_pid.send(Ok(child.id()));
            let _ = tell_exit.send(child.wait());
        }
        Err(error) => drop(tell_pid.send(Err(error))),
    });
    let program = |output: String| Error::Program { program: "postgres", output };
    spawned.map_err(|error| program(error.to_string()))?;
    let id = pid.recv().map_err(|error| program(error.to_string()))?.map_err(|error| program(error.to_string()))?;
    let pid = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or_else(|| program("no process id".into()))?;
    Ok((pid, exited))
}

#[allow(unsafe_code, reason = "pre_exec is unsafe; the one call in it is async-signal-safe")]
fn stop_with_parent(command: &mut Command) {
    // SAFETY: prctl allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| set_parent_process_death_signal(Some(Signal::INT)).map_err(io::Error::from));
    }
}

fn log_end(home: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = File::open(home.join("postgres.log")) {
        let length = file.metadata().map_or(0, |data| data.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(2000)));
        let mut bytes = Vec::new();
        let _ = file.read_to_end(&mut bytes);
        text = String::from_utf8_lossy(&bytes).into_owned();
    }
    format!("the end of {}:\n{text}", home.join("postgres.log").display())
}
