//! Finds the programs of Postgres, and the user that runs them.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Error;

/// Oldest major release that supports the storage contract.
const MAJOR_MIN: u32 = 14;

/// A directory with `initdb` and `postgres` of one release.
#[derive(Debug)]
pub(super) struct Programs {
    bin: PathBuf,
    /// Version of the programs, such as `15.18`.
    pub(super) version: String,
}

impl Programs {
    /// Finds the programs in the named directory, else in `PATH`, else in the usual directories, newest first. `major`
    /// is the release of an existing data directory; only this release can run it.
    pub(super) fn find(named: Option<&Path>, major: Option<&str>) -> Result<Self, Error> {
        if let Some(bin) = named {
            return Self::at(bin).ok_or_else(|| {
                Error::NoPrograms(format!("there is no working initdb and postgres in {}", bin.display()))
            });
        }
        let fits = |found: &Self| {
            let release = found.version.split('.').next().unwrap_or_default();
            major.map_or_else(
                || release.parse::<u32>().is_ok_and(|release| release >= MAJOR_MIN),
                |major| major == release,
            )
        };
        candidates().iter().filter_map(|bin| Self::at(bin)).find(fits).ok_or_else(|| Error::NoPrograms(hint(major)))
    }

    fn at(bin: &Path) -> Option<Self> {
        let initdb = bin.join("initdb");
        if !initdb.exists() {
            return None;
        }
        let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().nth(2)?.to_owned();
        // A link in `PATH` may lie outside of the directory to which the libraries' relative paths refer.
        let bin = initdb.canonicalize().ok()?.parent()?.to_owned();
        Some(Self { bin, version })
    }

    pub(super) fn initdb(&self) -> PathBuf {
        self.bin.join("initdb")
    }

    pub(super) fn postgres(&self) -> PathBuf {
        self.bin.join("postgres")
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    let mut usual = Vec::new();
    for root in ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt", "/Library/PostgreSQL"] {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        usual.extend(entries.filter_map(|entry| {
            let release: String = entry.file_name().to_string_lossy().chars().filter(char::is_ascii_digit).collect();
            Some((release.parse::<u32>().ok()?, entry.path().join("bin")))
        }));
    }
    for release in 14..30_u32 {
        usual.push((release, format!("/usr/pgsql-{release}/bin").into()));
    }
    usual.sort_by_key(|(release, _)| std::cmp::Reverse(*release));
    found.extend(usual.into_iter().map(|(_, bin)| bin));
    found.push("/usr/local/pgsql/bin".into());
    found
}

/// The error text for missing programs, with the install command of this platform.
fn hint(major: Option<&str>) -> String {
    let wanted = major.map_or_else(|| format!("Postgres {MAJOR_MIN} or newer"), |major| format!("Postgres {major}"));
    let has = |program: &str| Path::new("/usr/bin").join(program).exists();
    let command = if cfg!(target_os = "macos") {
        "brew install postgresql@17"
    } else if has("apt-get") {
        "sudo apt-get install -y postgresql"
    } else if has("dnf") {
        "sudo dnf install -y postgresql-server"
    } else if has("apk") {
        "sudo apk add postgresql"
    } else {
        "install it with your package manager"
    };
    format!(
        "no {wanted} was found (initdb and postgres in PATH or the usual directories).\n  \
         Install it:              {command}\n  \
         or name its directory:   --pg-bin /path/to/bin\n  \
         or use a running server: absurd serve --migrate --database-url postgresql://..."
    )
}

/// The user that runs the programs if this process is root, as which Postgres refuses to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl User {
    /// The owner of the directory; if that is root, `postgres`, else `nobody`. `None`: this process is not root.
    pub(super) fn for_data(home: &Path) -> Result<Option<Self>, Error> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let owner = fs::metadata(home)
            .map_err(|error| Error::Directory { path: home.to_owned(), problem: error.to_string() })?;
        if owner.uid() != 0 {
            return Ok(Some(Self { uid: owner.uid(), gid: owner.gid() }));
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let find = |name: &str| {
            passwd.lines().find_map(|line| {
                let mut fields = line.split(':');
                let known = fields.next()? == name;
                let uid = fields.nth(1)?.parse().ok()?;
                let gid = fields.next()?.parse().ok()?;
                known.then_some(Self { uid, gid })
            })
        };
        Ok(find("postgres").or_else(|| find("nobody")))
    }

    /// Fails if this user cannot enter the directory; below `/root`, for example, no other user can.
    pub(super) fn check_reach(&self, home: &Path) -> Result<(), Error> {
        let reached = Command::new("/bin/sh")
            .args(["-c", "cd \"$0\"", &home.to_string_lossy()])
            .current_dir("/")
            .uid(self.uid)
            .gid(self.gid)
            .stderr(std::process::Stdio::null())
            .status();
        if reached.is_ok_and(|status| status.success()) {
            return Ok(());
        }
        Err(Error::Directory {
            path: home.to_owned(),
            problem: format!("Postgres does not run as root, and user {} cannot enter this directory", self.uid),
        })
    }
}
