//! A Postgres cluster of one test, which the test can stop and start. `database.rs` has the cluster that all tests
//! share.

use std::path::PathBuf;

use absurd_server::postgres::{Cluster, ClusterOptions};
use tempfile::TempDir;

use crate::{Database, pg_bin};

/// A cluster of one test. Dropping it stops Postgres and removes the files.
#[derive(Debug)]
pub struct OwnCluster {
    options: ClusterOptions,
    running: Option<Cluster>,
    // Declared after the cluster, so that the files outlive it.
    _home: TempDir,
}

impl OwnCluster {
    /// Starts a cluster with these settings, written as `name=value`.
    pub async fn start(settings: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        // Started by root, Postgres runs as another user, which needs access to the directory.
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

    /// Creates a migrated database on this cluster.
    pub async fn database(&self) -> Database {
        Database::on(self.running.as_ref().unwrap()).await
    }

    /// A database on this cluster by its name, as it is.
    pub fn database_named(&self, name: &str) -> Database {
        Database::as_it_is(self.running.as_ref().unwrap(), name)
    }

    /// URL of a database on this cluster.
    pub fn url(&self, name: &str) -> String {
        self.running.as_ref().unwrap().url(name)
    }

    /// Release of Postgres.
    pub fn version(&self) -> String {
        self.running.as_ref().unwrap().version().to_owned()
    }

    /// Path of the log of Postgres.
    pub fn log(&self) -> PathBuf {
        self.options.home.join("postgres.log")
    }

    /// Stops Postgres.
    pub async fn stop(&mut self) {
        let running = self.running.take();
        tokio::task::spawn_blocking(move || drop(running)).await.unwrap();
    }

    /// Starts Postgres again after a stop.
    pub async fn start_again(&mut self) {
        let options = self.options.clone();
        self.running = Some(tokio::task::spawn_blocking(move || Cluster::start(&options).unwrap()).await.unwrap());
    }
}
