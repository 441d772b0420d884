//! One cluster per test process, and one database per test, copied from a migrated template. Databases of tests that
//! have ended are dropped, so that a long run needs little disk space.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use absurd_server::postgres::{Cluster, ClusterOptions};
use absurd_server::store::migrate;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};

static CLUSTER: OnceLock<Mutex<Cluster>> = OnceLock::new();
static TEMPLATE: OnceCell<()> = OnceCell::const_new();
static NEXT: AtomicU32 = AtomicU32::new(1);
/// Databases that no test uses any more; the next test that creates a database drops them.
static ENDED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Directory of this process's cluster. Directories of processes that have ended are removed.
pub fn data_directory() -> PathBuf {
    std::env::temp_dir().join(format!("absurd-test-{}", std::process::id()))
}

fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix("absurd-test-").and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Directory of the Postgres programs from `ABSURD_TEST_PG_BIN`, for tests on several releases. `None` means the
/// Postgres of the machine.
pub fn pg_bin() -> Option<PathBuf> {
    std::env::var_os("ABSURD_TEST_PG_BIN").map(PathBuf::from)
}

/// The cluster of this process, which starts on first use.
pub fn cluster() -> &'static Mutex<Cluster> {
    CLUSTER.get_or_init(|| {
        sweep();
        let options = ClusterOptions {
            home: data_directory(),
            bin: pg_bin(),
            durable: false,
            settings: vec!["max_connections=600".into(), "max_prepared_transactions=10".into()],
        };
        Mutex::new(Cluster::start(&options).unwrap_or_else(|error| panic!("no Postgres for the tests: {error}")))
    })
}

fn url(database: &str) -> String {
    cluster().lock().unwrap().url(database)
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("connect to the test cluster");
    tokio::spawn(connection);
    client
}

/// Initialises a database with upstream's own tool of this release.
async fn init(release: &str, url: &str) {
    let old = crate::root().join(".venv/releases").join(release);
    let mut tool = if old.exists() {
        let mut python = crate::tool("python", &[]);
        python.arg(old.join("bin/absurdctl")).env("PYTHONPATH", old);
        python
    } else {
        crate::tool("absurdctl", &[])
    };
    let ended = crate::in_time("the tool ends", tool.args(["init", "--database", url]).output()).await.unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && said.contains(release), "{said}{}", String::from_utf8_lossy(&ended.stderr));
}

/// A database of one test.
#[derive(Debug, Clone)]
pub struct Database {
    name: String,
    url: String,
    _use: Arc<Use>,
}

/// Held by each clone of a database of the shared cluster. The last one to be dropped lists the database in `ENDED`.
#[derive(Debug, Default)]
struct Use(Option<String>);

impl Drop for Use {
    fn drop(&mut self) {
        if let Some(name) = self.0.take() {
            ENDED.lock().unwrap().push(name);
        }
    }
}

impl Database {
    /// A migrated database, copied from the template.
    pub async fn new() -> Self {
        TEMPLATE
            .get_or_init(|| async {
                let admin = connect(&url("postgres")).await;
                // Ensures that this is our own cluster, because the following code creates and drops databases.
                let directory: String = admin.query_one("show data_directory", &[]).await.unwrap().get(0);
                assert!(Path::new(&directory).starts_with(data_directory().canonicalize().unwrap()), "{directory}");
                admin.batch_execute("create database template_absurd").await.unwrap();
                let config = url("template_absurd").parse().unwrap();
                // With `ABSURD_TEST_ADOPTED`, tests run on a database that upstream's tool made, with our doorbell
                // installed.
                let adopted = std::env::var("ABSURD_TEST_ADOPTED").ok();
                if let Some(release) = &adopted {
                    init(release, &url("template_absurd")).await;
                }
                let options = migrate::Options { doorbell: adopted.is_some(), no_doorbell: false };
                migrate::migrate(&config, options).await.unwrap();
                admin.batch_execute("alter database template_absurd allow_connections false").await.unwrap();
            })
            .await;
        Self::create("template template_absurd").await
    }

    /// A database with nothing in it.
    pub async fn empty() -> Self {
        Self::create("template template0").await
    }

    /// A database as upstream's tool of this release makes it, with nothing of ours.
    pub async fn upstream(release: &str) -> Self {
        Self::upstream_where_possible(release).await.expect("every Postgres can hold this release")
    }

    /// As [`Database::upstream`], but `None` if the release needs an extension that this Postgres lacks.
    pub async fn upstream_where_possible(release: &str) -> Option<Self> {
        let database = Self::empty().await;
        let has = "select exists (select from pg_available_extensions where name = 'uuid-ossp')";
        let has: bool = database.connect().await.query_one(has, &[]).await.unwrap().get(0);
        if !has && ["0.3.0", "0.4.0"].contains(&release) {
            eprintln!("this Postgres has no uuid-ossp, which release {release} needs");
            return None;
        }
        init(release, database.url()).await;
        Some(database)
    }

    /// Structure of the database as `pg_dump` writes it, of one schema or of all.
    pub async fn dump(&self, schema: Option<&str>) -> String {
        // `pg_dump` refuses a server that is newer than itself.
        let own = pg_bin().map(|bin| bin.join("pg_dump")).filter(|program| program.exists());
        let mut dump = tokio::process::Command::new(own.unwrap_or_else(|| "pg_dump".into()));
        dump.args(["--schema-only", "--dbname", &self.url]).args(schema.map(|schema| format!("--schema={schema}")));
        let output = crate::in_time("pg_dump ends", dump.output()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // Newer releases put a random word into each dump.
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| !line.contains("restrict ")).map(|line| format!("{line}\n")).collect()
    }

    /// Creates a migrated database on another cluster, which the test can stop and start.
    pub(crate) async fn on(cluster: &Cluster) -> Self {
        let admin = connect(&cluster.url("postgres")).await;
        admin.batch_execute("create database own").await.unwrap();
        let url = cluster.url("own");
        migrate::migrate(&url.parse().unwrap(), migrate::Options::default()).await.unwrap();
        Self { name: "own".into(), url, _use: Arc::default() }
    }

    /// A database of another cluster, as it is.
    pub(crate) fn as_it_is(cluster: &Cluster, name: &str) -> Self {
        Self { name: name.into(), url: cluster.url(name), _use: Arc::default() }
    }

    async fn create(how: &str) -> Self {
        let name = format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let admin = connect(&url("postgres")).await;
        let ended = std::mem::take(&mut *ENDED.lock().unwrap());
        for name in ended {
            admin.batch_execute(&format!("drop database {name} with (force)")).await.unwrap();
        }
        // Postgres refuses, for a moment, to copy a database that another session is copying.
        crate::eventually("the database is created", || async {
            admin.batch_execute(&format!("create database {name} {how}")).await.ok()
        })
        .await;
        Self { url: url(&name), _use: Arc::new(Use(Some(name.clone()))), name }
    }

    /// Name of the database.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// URL of the database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Opens a session for direct SQL, as the user of the URL.
    pub async fn connect(&self) -> Client {
        connect(&self.url).await
    }

    /// Opens a session as a role that owns nothing here; creates the role if need be.
    pub async fn connect_as(&self, role: &str) -> Client {
        let admin = self.connect().await;
        let _ = admin.batch_execute(&format!("create role {role} login")).await;
        connect(&self.url.replace("//absurd@", &format!("//{role}@"))).await
    }
}
