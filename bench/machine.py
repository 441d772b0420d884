"""The Postgres of the benchmark, and what it costs: a private cluster with safe commits, clocks of CPU, WAL and flushes."""

import glob
import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path

import psycopg

HOME = Path(os.environ["BENCH_HOME"])
PORT = os.environ.get("BENCH_PORT", "55433")
TICKS = os.sysconf("SC_CLK_TCK")
SETTINGS = {
    "port": PORT, "listen_addresses": "'127.0.0.1'", "shared_buffers": "1GB", "max_connections": 400,
    "fsync": "on", "synchronous_commit": "on", "max_wal_size": "4GB",
}


def url(database):
    return f"postgresql://postgres@127.0.0.1:{PORT}/{database}"


def programs():
    found = os.environ.get("BENCH_PG_BIN") or sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1]
    return Path(found)


def _postgres(*command):
    """Postgres does not run as root."""
    user = {} if os.geteuid() else {"user": "postgres", "group": "postgres", "extra_groups": []}
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, cwd="/", **user)


class Machine:
    """A running cluster."""

    def __init__(self):
        self.data = HOME / "pg"
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(parents=True)
        if os.geteuid() == 0:
            os.chmod(HOME, 0o755)
            os.chown(self.data, pwd.getpwnam("postgres").pw_uid, pwd.getpwnam("postgres").pw_gid)
        _postgres(programs() / "initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "--no-locale", "-E", "UTF8")
        with open(self.data / "postgresql.conf", "a") as conf:
            conf.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())
            conf.write(f"unix_socket_directories = '{self.data}'\n")
        _postgres(programs() / "pg_ctl", "-D", self.data, "-l", self.data / "log", "-w", "start")
        self.sql = psycopg.connect(url("postgres"), autocommit=True)
        self.postmaster = int((self.data / "postmaster.pid").read_text().split()[0])

    def stop(self):
        self.sql.close()
        _postgres(programs() / "pg_ctl", "-D", self.data, "-m", "fast", "-w", "stop")

    def database(self, name, template=None):
        self.sql.execute(f'drop database if exists "{name}" with (force)')
        self.sql.execute(f'create database "{name}"' + (f' template "{template}"' if template else ""))
        return name

    def transactions(self, database):
        query = "select xact_commit + xact_rollback from pg_stat_database where datname = %s"
        return self.sql.execute(query, (database,)).fetchone()[0]

    def cost(self):
        """CPU seconds of Postgres, and flushes of the WAL, so far."""
        cpu = _cpu(self.postmaster, children=True)
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    if _parent(entry) == self.postmaster:
                        cpu += _cpu(entry)
                except OSError:
                    pass
        return cpu, self.sql.execute("select wal_sync from pg_stat_wal").fetchone()[0]


def _fields(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def _parent(pid):
    return int(_fields(pid)[1])


def _cpu(pid, children=False):
    return sum(map(int, _fields(pid)[11:15 if children else 13])) / TICKS


def flush_ms():
    """How long the disk takes to flush 8 kB just now (median of 0.3 s)."""
    file = os.open(HOME / "flush", os.O_RDWR | os.O_CREAT)
    times, until = [], time.perf_counter() + 0.3
    while time.perf_counter() < until:
        started = time.perf_counter()
        os.pwrite(file, os.urandom(8192), 0)
        os.fdatasync(file)
        times.append(time.perf_counter() - started)
    os.close(file)
    return round(sorted(times)[len(times) // 2] * 1000, 3)
