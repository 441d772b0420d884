//! A Postgres of a test's own, which the test may stop and start; the one that all tests share is in `database.rs`.

use std::path::PathBuf;

use absurd_server::postgres::{Cluster, ClusterOptions};
use tempfile::TempDir;

use crate::{Database, pg_bin};

/// See the module. Dropping it stops it and removes its files.
#[derive(Debug)]
pub struct OwnCluster {
    options: ClusterOptions,
    running: Option<Cluster>,
    // After the cluster, so that its files outlive it.
    _home: TempDir,
}

impl OwnCluster {
    /// Starts one with settings, as `name=value`.
    pub async fn start(settings: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        // Run by root, Postgres runs as another user.
        std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let options = ClusterOptions {
            home: home.path().join("pg"),
            bin: pg_bin(),
            durable: false,
            settings: settings.iter().map(|setting| (*setting).to_owned()).collect(),
        };
        let mut own = Self { options, running: None, _home: home };
        own.start_again().await;
        own
    }

    /// A migrated database on it.
    pub async fn database(&self) -> Database {
        Database::on(self.running.as_ref().unwrap()).await
    }

    /// Another database on it, as it is.
    pub fn database_named(&self, name: &str) -> Database {
        Database::as_it_is(self.running.as_ref().unwrap(), name)
    }

    /// The URL of a database on it.
    pub fn url(&self, name: &str) -> String {
        self.running.as_ref().unwrap().url(name)
    }

    /// Its release.
    pub fn version(&self) -> String {
        self.running.as_ref().unwrap().version().to_owned()
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.options.home.join("postgres.log")
    }

    /// Stops it.
    pub async fn stop(&mut self) {
        let running = self.running.take();
        tokio::task::spawn_blocking(move || drop(running)).await.unwrap();
    }

    /// Starts it after a stop.
    pub async fn start_again(&mut self) {
        let options = self.options.clone();
        self.running = Some(tokio::task::spawn_blocking(move || Cluster::start(&options).unwrap()).await.unwrap());
    }
}
