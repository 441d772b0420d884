//! What is broken on purpose: a Postgres with the audit in it, replicas, workers, producers, and a link between any two.

use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use absurd_server::postgres::{Cluster, ClusterOptions};
use absurd_server::store::migrate;
use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_postgres::NoTls;

use crate::history::now;
use crate::ledger::Finding;
use crate::shape::QUEUE;
use absurd_tests::{Link, Target, Toxic};

/// How big a world is, and what is wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Size {
    pub seed: u64,
    pub replicas: usize,
    /// One of them is Python's.
    pub workers: usize,
    pub producers: usize,
    /// Tasks per second, of all producers.
    pub rate: f64,
    /// Tasks of all producers at most.
    pub tasks: u64,
    pub in_flight: u32,
    /// Longest time of a step, ms.
    pub work: u64,
    /// Lease of a claim, s.
    pub lease: u64,
    /// Longest time from the end of a lease to the next claim of its task.
    pub redelivery_max: Duration,
    /// Python's worker gives claims back, and goes on with them nevertheless.
    pub stubborn: bool,
    /// More settings of Postgres.
    pub settings: Vec<String>,
    /// The program to serve with.
    pub program: PathBuf,
    /// Planted bug: producers make another task of a spawn of which nothing is known.
    pub new_id_when_unknown: bool,
    /// Planted bug of the server, by its name; the program must have been built for it.
    pub planted: Option<&'static str>,
    /// Connections of each replica to Postgres.
    pub connections: usize,
    /// More flags of every replica.
    pub flags: Vec<String>,
    /// Postgres gets a disk of its own, of so many MiB, where this process may mount one.
    pub disk: Option<u32>,
}

/// A small disk, which can be filled. Unmounted when dropped.
#[derive(Debug)]
struct Disk {
    at: PathBuf,
}

impl Disk {
    /// None: this process may not mount anything.
    fn mount(at: &Path, mib: u32) -> Option<Self> {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=0755"), "tmpfs"]).arg(at);
        let mounted = mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        mounted.then(|| Self { at: at.to_owned() })
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// A process of ours.
#[derive(Debug)]
pub(crate) struct Process {
    child: Option<Child>,
}

impl Process {
    fn pid(&self) -> Option<Pid> {
        let id = i32::try_from(self.child.as_ref()?.id()?).ok()?;
        Pid::from_raw(id)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGKILL, and waits for the end.
    pub(crate) async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.start_kill();
            let _ = child.wait().await;
        }
    }

    /// SIGTERM; the exit code, or None when it had to be killed.
    pub(crate) async fn stop(&mut self, limit: Duration) -> Option<i32> {
        self.signal(Signal::TERM);
        let mut child = self.child.take()?;
        match tokio::time::timeout(limit, child.wait()).await {
            Ok(status) => status.ok()?.code(),
            Err(_) => {
                let _ = child.start_kill();
                let _ = child.wait().await;
                None
            }
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }
}

/// What was done to the world, and when.
#[derive(Debug, Clone)]
pub(crate) struct Deed {
    pub at: i64,
    pub what: String,
    /// Claims that were held at that time.
    pub leases: i64,
}

/// See the module.
pub(crate) struct World {
    pub size: Size,
    pub home: PathBuf,
    pub random: fastrand::Rng,
    cluster: Option<Cluster>,
    cluster_options: ClusterOptions,
    /// What would take over.
    standby: Option<Cluster>,
    // After the clusters, so that it outlives them.
    disk: Option<Disk>,
    /// Clusters were made so often.
    clusters: usize,
    /// Where the database is now.
    pub address: Arc<Mutex<String>>,
    ports: Vec<u16>,
    /// Where replicas serve their metrics.
    metrics: Vec<u16>,
    pub replicas: Vec<Process>,
    pub workers: Vec<Process>,
    pub producers: Vec<Process>,
    /// `before[client][replica]`: workers first, then producers.
    pub before: Vec<Vec<Link>>,
    /// One per replica.
    pub database: Vec<Link>,
    pub deeds: Arc<Mutex<Vec<Deed>>>,
    /// Times in which nothing could be done: no Postgres, or no replica.
    pub down: Vec<(i64, i64)>,
    down_since: Option<i64>,
    /// How replicas ended after SIGTERM: time, and exit code.
    pub restarts: Vec<(Duration, Option<i32>)>,
    /// Processes were started so often: their books and logs are numbered.
    starts: usize,
    /// What a scenario has measured.
    pub figures: Vec<(&'static str, i64)>,
    /// What a scenario has found.
    pub findings: Vec<Finding>,
}

/// A program that ends with this process, however that ends: a worker that outlived its world would meet the next one.
fn bound_to_us(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

async fn connect(url: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Ports below those that connections get by themselves: a replica that is started again finds its own free.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let ports = std::iter::repeat_with(|| fastrand::u16(20_000..32_000)).take(1000);
    // Held until all are there, so that none is taken twice.
    let held: Vec<_> =
        ports.filter_map(|port| std::net::TcpListener::bind(("127.0.0.1", port)).ok()).take(count).collect();
    anyhow::ensure!(held.len() == count, "no ports are free");
    held.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_owned).unwrap_or_default()
}

impl World {
    /// Starts all of it in a directory.
    pub(crate) async fn start(home: &Path, size: Size) -> anyhow::Result<Self> {
        std::fs::create_dir_all(home)?;
        let postgres = home.join("pg");
        std::fs::create_dir_all(&postgres)?;
        std::fs::set_permissions(home, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let mut settings: Vec<String> =
            ["max_connections=200", "log_lock_waits=on", "deadlock_timeout=100ms", "max_prepared_transactions=0"]
                .map(str::to_owned)
                .to_vec();
        settings.extend(size.settings.iter().cloned());
        let cluster_options = ClusterOptions { home: postgres.clone(), bin: None, durable: true, settings };
        let mut ports = free_ports(2 * size.replicas)?;
        let mut world = Self {
            random: fastrand::Rng::with_seed(size.seed),
            home: home.to_owned(),
            cluster: None,
            cluster_options,
            standby: None,
            disk: size.disk.and_then(|mib| Disk::mount(&postgres, mib)),
            clusters: 1,
            address: Arc::default(),
            metrics: ports.split_off(size.replicas),
            ports,
            replicas: Vec::new(),
            workers: Vec::new(),
            producers: Vec::new(),
            before: Vec::new(),
            database: Vec::new(),
            deeds: Arc::new(Mutex::new(Vec::new())),
            down: Vec::new(),
            down_since: None,
            restarts: Vec::new(),
            starts: 0,
            figures: Vec::new(),
            findings: Vec::new(),
            size,
        };
        world.start_postgres().await?;
        world.prepare().await?;
        for replica in 0..world.size.replicas {
            world.database.push(Link::to(world.target()).await?);
            world.replicas.push(Process { child: None });
            world.start_replica(replica).await?;
        }
        for replica in 0..world.size.replicas {
            world.serves(replica).await?;
        }
        for _ in 0..world.size.workers + world.size.producers {
            let mut links = Vec::new();
            for port in &world.ports {
                links.push(Link::to(Target::Port(*port)).await?);
            }
            world.before.push(links);
        }
        for _ in 0..world.size.workers {
            world.workers.push(Process { child: None });
        }
        Ok(world)
    }

    /// Starts the load.
    pub(crate) async fn load(&mut self) -> anyhow::Result<()> {
        for worker in 0..self.size.workers {
            self.start_worker(worker)?;
        }
        for producer in 0..self.size.producers {
            self.start_producer(producer)?;
        }
        Ok(())
    }

    async fn prepare(&mut self) -> anyhow::Result<()> {
        let url = self.url();
        migrate::migrate(&url.parse()?, migrate::Options::default()).await?;
        let sql = self.sql().await?;
        sql.execute("select absurd.create_queue($1)", &[&QUEUE]).await?;
        sql.batch_execute(include_str!("audit.sql")).await?;
        Ok(())
    }

    /// The database, without a link between.
    pub(crate) fn url(&self) -> String {
        self.cluster.as_ref().map(|cluster| cluster.url("postgres")).unwrap_or_default()
    }

    /// A session without a link between.
    pub(crate) async fn sql(&self) -> anyhow::Result<tokio_postgres::Client> {
        connect(&self.url()).await
    }

    /// URLs of all replicas, through a client's links.
    fn urls(&self, client: usize) -> String {
        let urls: Vec<String> =
            self.before[client].iter().map(|link| format!("http://127.0.0.1:{}", link.port())).collect();
        urls.join(",")
    }

    /// URL of a replica, without a link between.
    pub(crate) fn replica_url(&self, replica: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[replica])
    }

    fn log(&self, name: &str) -> anyhow::Result<Stdio> {
        let path = self.home.join(format!("{name}.log"));
        Ok(std::fs::File::options().create(true).append(true).open(path)?.into())
    }

    pub(crate) async fn start_postgres(&mut self) -> anyhow::Result<()> {
        let options = self.cluster_options.clone();
        let until = Instant::now() + Duration::from_secs(60);
        let cluster = loop {
            let options = options.clone();
            match tokio::task::spawn_blocking(move || Cluster::start(&options)).await? {
                Ok(cluster) => break cluster,
                // After a SIGKILL the old sessions hold the shared memory for a moment.
                Err(error) if Instant::now() > until => return Err(error.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        self.serve_from(cluster);
        Ok(())
    }

    /// This is the database from now on.
    fn serve_from(&mut self, cluster: Cluster) {
        if let Ok(mut address) = self.address.lock() {
            *address = cluster.url("postgres");
        }
        self.cluster = Some(cluster);
        for link in &self.database {
            link.lead_to(self.target());
        }
        self.up();
    }

    /// What links before the database lead to.
    fn target(&self) -> Target {
        let url = self.url();
        let socket = url.rsplit_once("host=").map_or("", |(_, path)| path);
        Target::Path(Path::new(socket).join(".s.PGSQL.5432"))
    }

    /// A program of the running Postgres, run as its user.
    fn program(&self, name: &str) -> anyhow::Result<std::process::Command> {
        let cluster = self.cluster.as_ref().context("Postgres runs")?;
        let owner = std::fs::metadata(cluster.home().join("data"))?;
        let path = std::fs::read_link(format!("/proc/{}/exe", cluster.pid()))?.with_file_name(name);
        let mut command = std::process::Command::new(path);
        command.uid(owner.uid()).gid(owner.gid()).current_dir("/").stdin(Stdio::null());
        Ok(command)
    }

    /// A standby that follows the database; with `wait`, commits are acknowledged when it has them too.
    pub(crate) async fn add_standby(&mut self, wait: bool) -> anyhow::Result<()> {
        self.clusters += 1;
        let home = self.home.join(format!("pg-{}", self.clusters));
        std::fs::create_dir(&home)?;
        let owner = std::fs::metadata(self.cluster_options.home.join("data"))?;
        chown(&home, Some(owner.uid()), Some(owner.gid()))?;
        let mut backup = self.program("pg_basebackup")?;
        backup.args(["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync", "--pgdata"]);
        backup.arg(home.join("data")).args(["--dbname", &self.url()]);
        let output = tokio::task::spawn_blocking(move || backup.output()).await??;
        anyhow::ensure!(output.status.success(), "pg_basebackup: {}", String::from_utf8_lossy(&output.stderr));
        let options = ClusterOptions { home, ..self.cluster_options.clone() };
        self.standby = Some(tokio::task::spawn_blocking(move || Cluster::start(&options)).await??);
        if wait {
            let sql = self.sql().await?;
            sql.batch_execute("alter system set synchronous_standby_names = '*'").await?;
            sql.batch_execute("select pg_reload_conf()").await?;
        }
        let until = Instant::now() + Duration::from_secs(30);
        let state = if wait { "sync" } else { "async" };
        let follows = "select exists (select from pg_stat_replication where state = 'streaming' and sync_state = $1)";
        while !self.sql().await?.query_one(follows, &[&state]).await?.get::<_, bool>(0) {
            anyhow::ensure!(Instant::now() < until, "no standby follows");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The standby hears no more of the database.
    pub(crate) async fn cut_standby(&self) -> anyhow::Result<()> {
        let standby = self.standby.as_ref().context("a standby")?;
        let sql = connect(&standby.url("postgres")).await?;
        sql.batch_execute("alter system set primary_conninfo = ''").await?;
        sql.batch_execute("select pg_reload_conf()").await?;
        Ok(())
    }

    /// The database is killed for good, and its standby takes over.
    pub(crate) async fn fail_over(&mut self) -> anyhow::Result<()> {
        self.kill_postgres().await;
        let standby = self.standby.take().context("a standby")?;
        connect(&standby.url("postgres")).await?.execute("select pg_promote(true, 60)", &[]).await?;
        self.cluster_options.home = standby.home().to_owned();
        self.serve_from(standby);
        Ok(())
    }

    /// Leaves no room on the disk of Postgres; false where it has none of its own.
    pub(crate) fn fill_disk(&mut self) -> anyhow::Result<bool> {
        let Some(disk) = &self.disk else { return Ok(false) };
        let mut filler = std::fs::File::options().create(true).append(true).open(disk.filler())?;
        while std::io::Write::write_all(&mut filler, &[0; 64 * 1024]).is_ok() {}
        while std::io::Write::write_all(&mut filler, &[0; 512]).is_ok() {}
        self.went_down();
        Ok(true)
    }

    /// Gives the room back; a Postgres that has ended for want of it is started.
    pub(crate) async fn free_disk(&mut self) -> anyhow::Result<()> {
        if let Some(disk) = &self.disk {
            std::fs::remove_file(disk.filler())?;
        }
        if self.cluster.as_mut().is_none_or(Cluster::has_exited) {
            self.cluster = None;
            self.start_postgres().await?;
        }
        self.up();
        Ok(())
    }

    /// Uses up transaction ids until Postgres gives out no more; it runs again afterwards.
    pub(crate) async fn use_up_ids(&mut self) -> anyhow::Result<()> {
        let sql = self.sql().await?;
        let oldest = "select min(datfrozenxid::text::bigint)::bigint from pg_database";
        let oldest: i64 = sql.query_one(oldest, &[]).await?.get(0);
        // Postgres stops three million before the ids would mean something else.
        let next = oldest + (1 << 31) - 3_000_000 + 1000;
        let mut reset = self.program("pg_resetwal")?;
        let data = self.cluster_options.home.join("data");
        let owner = std::fs::metadata(&data)?;
        self.stop_postgres().await;
        let output = reset.args(["-x", &next.to_string(), "--pgdata"]).arg(&data).output()?;
        anyhow::ensure!(output.status.success(), "pg_resetwal: {}", String::from_utf8_lossy(&output.stderr));
        // The page of the status file that these ids would have reached.
        let page = data.join(format!("pg_xact/{:04X}", next >> 20));
        std::fs::write(&page, vec![0; 256 * 1024])?;
        chown(&page, Some(owner.uid()), Some(owner.gid()))?;
        std::fs::set_permissions(&page, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        self.start_postgres().await
    }

    /// SIGKILL of the postmaster: its sessions end by themselves, and nothing is flushed.
    pub(crate) async fn kill_postgres(&mut self) {
        self.went_down();
        if let Some(cluster) = self.cluster.take() {
            if let Some(pid) = Pid::from_raw(cluster.pid()) {
                let _ = kill_process(pid, Signal::KILL);
            }
            let _ = tokio::task::spawn_blocking(move || drop(cluster)).await;
        }
    }

    /// A quick stop, as an administrator would.
    pub(crate) async fn stop_postgres(&mut self) {
        self.went_down();
        let cluster = self.cluster.take();
        let _ = tokio::task::spawn_blocking(move || drop(cluster)).await;
    }

    pub(crate) async fn start_replica(&mut self, replica: usize) -> anyhow::Result<()> {
        let name = format!("replica-{replica}");
        let mut command = bound_to_us(&self.size.program);
        for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("ABSURD_")) {
            command.env_remove(variable);
        }
        command
            .args(["serve", "--listen", &format!("127.0.0.1:{}", self.ports[replica])])
            .args(["--max-connections", &self.size.connections.to_string()])
            .args(["--metrics-listen", &format!("127.0.0.1:{}", self.metrics[replica])])
            .args(["--shutdown-grace", "10s", "--database-url"])
            .arg(format!("postgresql://absurd@127.0.0.1:{}/postgres", self.database[replica].port()))
            .args(&self.size.flags)
            .stdin(Stdio::null())
            .stdout(self.log(&name)?)
            .stderr(self.log(&name)?)
            .kill_on_drop(true);
        if let Some(bug) = self.size.planted {
            command.env("ABSURD_PLANTED_BUG", bug);
        }
        self.replicas[replica].child =
            Some(command.spawn().with_context(|| format!("{}", self.size.program.display()))?);
        if self.cluster.is_some() {
            self.up();
        }
        Ok(())
    }

    /// Waits until a replica answers.
    async fn serves(&mut self, replica: usize) -> anyhow::Result<()> {
        let until = Instant::now() + Duration::from_secs(30);
        while self.metric(replica, "absurd_streams ").await.is_none() {
            let log = self.home.join(format!("replica-{replica}.log"));
            anyhow::ensure!(
                self.replicas[replica].is_running() && Instant::now() < until,
                "replica {replica} does not serve: {}",
                std::fs::read_to_string(log).unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    pub(crate) fn start_worker(&mut self, worker: usize) -> anyhow::Result<()> {
        self.starts += 1;
        let name = format!("w{worker}");
        let history = self.home.join(format!("history-{name}-{}.jsonl", self.starts));
        // The first one is Python's, where its client has been generated.
        let mut command = if worker == 0 {
            let mut python = bound_to_us(&root().join(".venv/bin/python"));
            python.arg(root().join("tests/chaos/src/worker.py")).env("PYTHONPATH", root().join(".venv/generated"));
            python.args(self.size.stubborn.then_some("--stubborn"));
            python
        } else {
            let mut own = bound_to_us(&std::env::current_exe()?);
            own.arg("worker");
            own
        };
        command
            .args(["--name", &name, "--urls", &self.urls(worker), "--in-flight", &self.size.in_flight.to_string()])
            .args(["--lease", &self.size.lease.to_string(), "--history"])
            .arg(history)
            .stdin(Stdio::null())
            .stdout(self.log(&name)?)
            .stderr(self.log(&name)?)
            .kill_on_drop(true);
        self.workers[worker].child = Some(command.spawn().with_context(|| format!("worker {name}"))?);
        Ok(())
    }

    fn start_producer(&mut self, producer: usize) -> anyhow::Result<()> {
        let count = self.size.producers as f64;
        let name = format!("p{producer}");
        let urls = self.urls(self.size.workers + producer);
        let mut command = bound_to_us(&std::env::current_exe()?);
        command
            .args(["producer", "--name", &name, "--urls", &urls, "--rate", &(self.size.rate / count).to_string()])
            .args(["--work", &self.size.work.to_string()])
            .args(["--seed", &(self.size.seed.wrapping_add(producer as u64)).to_string()])
            .args(["--tasks", &(self.size.tasks / self.size.producers as u64).to_string(), "--history"])
            .arg(self.home.join(format!("history-{name}.jsonl")))
            .stdin(Stdio::null())
            .stdout(self.log(&name)?)
            .stderr(self.log(&name)?)
            .kill_on_drop(true);
        if self.size.new_id_when_unknown {
            command.arg("--new-id-when-unknown");
        }
        self.producers.push(Process { child: Some(command.spawn()?) });
        Ok(())
    }

    /// Writes down what is about to be done, and how many claims it meets.
    pub(crate) async fn deed(&self, what: impl Into<String>) {
        let (at, what) = (now(), what.into());
        let leases = async {
            let sql = self.sql().await.ok()?;
            let row = sql.query_one("select count(*) from absurd.r_chaos where state = 'running'", &[]).await.ok()?;
            Some(row.get(0))
        };
        let leases = tokio::time::timeout(Duration::from_secs(2), leases).await.ok().flatten().unwrap_or(0);
        if let Ok(mut deeds) = self.deeds.lock() {
            deeds.push(Deed { at, what, leases });
        }
    }

    pub(crate) fn went_down(&mut self) {
        self.down_since.get_or_insert_with(now);
    }

    /// Something can be done again.
    pub(crate) fn up(&mut self) {
        if let Some(since) = self.down_since.take() {
            self.down.push((since, now()));
        }
    }

    /// Every link passes bytes.
    pub(crate) fn heal_links(&self) {
        for link in self.before.iter().flatten().chain(&self.database) {
            link.set(Toxic::Pass);
        }
    }

    /// Everything runs again and can be reached.
    pub(crate) async fn heal(&mut self) -> anyhow::Result<()> {
        self.heal_links();
        if self.cluster.as_mut().is_none_or(Cluster::has_exited) {
            self.cluster = None;
            self.start_postgres().await?;
        }
        for replica in 0..self.replicas.len() {
            self.replicas[replica].signal(Signal::CONT);
            if !self.replicas[replica].is_running() {
                self.start_replica(replica).await?;
            }
        }
        for worker in 0..self.workers.len() {
            self.workers[worker].signal(Signal::CONT);
            if !self.workers[worker].is_running() {
                self.start_worker(worker)?;
            }
        }
        Ok(())
    }

    /// Answers that links before Postgres have swallowed.
    pub(crate) fn swallowed(&self) -> u64 {
        self.database.iter().map(Link::swallowed).sum()
    }

    /// Ends all processes but Postgres.
    pub(crate) async fn stop(&mut self) {
        let all = self.producers.iter_mut().chain(&mut self.workers).chain(&mut self.replicas);
        futures_util::future::join_all(all.map(|process| process.stop(Duration::from_secs(15)))).await;
    }
}

impl World {
    /// Writes down how a replica ended after SIGTERM.
    pub(crate) fn restarted(&mut self, took: Duration, code: Option<i32>) {
        self.restarts.push((took, code));
    }

    /// The sum of a replica's metrics whose lines begin so; None where it does not answer.
    pub(crate) async fn metric(&self, replica: usize, name: &str) -> Option<f64> {
        let ask = async {
            let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", self.metrics[replica])).await.ok()?;
            socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.ok()?;
            let mut page = String::new();
            socket.read_to_string(&mut page).await.ok()?;
            let values = page.lines().filter(|line| line.starts_with(name));
            Some(values.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
        };
        tokio::time::timeout(Duration::from_secs(2), ask).await.ok().flatten()
    }

    /// Failures of statements of a kind that all replicas have met.
    pub(crate) async fn faults(&self, kind: &str) -> i64 {
        let name = format!("absurd_database_faults_total{{kind=\"{kind}\"}}");
        let mut count = 0.0;
        for replica in 0..self.replicas.len() {
            count += self.metric(replica, &name).await.unwrap_or(0.0);
        }
        count as i64
    }

    /// Memory of a replica, bytes.
    pub(crate) fn resident(&self, replica: usize) -> anyhow::Result<i64> {
        let pid = self.replicas[replica].pid().context("the replica runs")?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("its memory")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<i64>()? * 1024)
    }

    /// Changes how many files a replica may have open.
    pub(crate) fn limit_files(&self, replica: usize, count: u64) -> anyhow::Result<()> {
        let pid = self.replicas[replica].pid().context("the replica runs")?;
        let limit = rustix::process::Rlimit { current: Some(count), maximum: Some(1024.max(count)) };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, limit)?;
        Ok(())
    }
}
