"""Measures everybody in one run on one Postgres: round by round, peers in turn, so that ratios share the machine's mood."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import psycopg

import machine
import report
from peers import COUNTER, HERE, OURS_LEFT, PEERS, TARGET, Adapter, Server, add_before, prepare, slug

MEASURES = ["limits", "spawn", "batch", "drain", "steady", "latency", "idle", "steps"]


def arguments():
    parser = argparse.ArgumentParser(
        description="Ours beside peers, on this machine.",
        epilog="examples: bench/run | bench/run --quick --only 'ours;pg-boss' --measures drain | bench/run --out mine.json")
    parser.add_argument("--quick", action="store_true", help="one round, smaller")
    parser.add_argument("--rounds", type=int, help="rounds of each measure (default: 3; 10 with --against)")
    parser.add_argument("--against", metavar="FOLDER", help="measure ours beside the programs of an earlier commit (bench/run against)")
    parser.add_argument("--only", default="", help="peers, by the beginnings of their names, separated by ;")
    parser.add_argument("--measures", default=",".join(MEASURES), help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep what the file has of other measures")
    parser.add_argument("--out", default=str(HERE / "results.json"), help="file for the results (default: %(default)s)")
    return parser.parse_args()


class Bench:
    def __init__(self, asked):
        self.against = asked.against
        if self.against:
            add_before(Path(self.against))
            asked.only = asked.only or "ours;before"
        self.rounds = 1 if asked.quick else asked.rounds or (10 if self.against else 3)
        self.scale = 0.2 if asked.quick else 1
        beginnings = [part for part in asked.only.split(";") if part]
        self.peers = [peer for peer in PEERS if not beginnings or any(peer.startswith(part) for part in beginnings)]
        self.measures = asked.measures.split(",")
        self.out = Path(asked.out)
        self.postgres = machine.Machine()
        self.results = {"about": self.about(), "limits": {}, "peers": {peer: {} for peer in self.peers}, "failed": {}}
        if asked.keep:
            # What is measured anew takes the place of what was there.
            self.results |= {name: value for name, value in json.loads(self.out.read_text()).items() if name != "about"}
            for found in self.results["peers"].values():
                for measure in self.measures:
                    found.pop(measure, None)
                    found.pop(measure + "_quick", None)
        self.prepared = set()

    def about(self):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
        return {
            "date": datetime.date.today().isoformat(), "commit": git.stdout.strip(), "cores": os.cpu_count(),
            "machine": platform.machine(), "postgres": self.postgres.sql.execute("show server_version").fetchone()[0],
            "settings": machine.SETTINGS, "rounds": self.rounds,
            "versions": (HERE / "python/requirements.txt").read_text().split()
            + [f"{name} {version}" for name, version in
               json.loads((HERE / "node/package.json").read_text())["dependencies"].items()],
        }

    def say(self, *words):
        print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)

    def save(self):
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def note(self, peer, measure, value):
        self.results["peers"][peer].setdefault(measure, []).append(value)

    def fresh(self, peer, tag="", env=None):
        """A database of its own, and a server on it if it is for us."""
        template = slug(peer) + tag + "_template"
        if template not in self.prepared:
            prepare(self.postgres, peer, tag, env)
            self.prepared.add(template)
        database = self.postgres.database(slug(peer), template)
        self.postgres.sql.execute("checkpoint")
        return database, Server(peer, database)

    def each(self, measure, act, peers=None, rounds=None):
        """Every round of a measure, every peer in turn."""
        if measure not in self.measures:
            return
        for number in range(rounds or self.rounds):
            turn = self.peers if peers is None else [peer for peer in peers if peer in self.peers]
            # Whoever comes second finds a warmer machine: in turn.
            for peer in reversed(turn) if self.against and number % 2 else turn:
                try:
                    act(peer)
                except Exception as error:  # noqa: BLE001 - one peer's trouble is not the others'
                    self.results["failed"].setdefault(f"{peer}: {measure}", []).append(repr(error))
                    self.say(peer, measure, "failed:", error)
            self.results.setdefault("flush_ms", {}).setdefault(measure, []).append(machine.flush_ms())
            self.say(measure, "round", number + 1, {peer: self.last(peer, measure) for peer in self.peers})
            self.save()

    def last(self, peer, measure):
        values = self.results["peers"][peer].get(measure)
        return values and {name: round(value, 2) for name, value in values[-1].items() if isinstance(value, (int, float))}

    # --- what is measured ------------------------------------------------------------------------------------------

    def spawn(self, peer, count, batch=1, task="noop"):
        """Spawns into a fresh database; returns what it cost."""
        database, server = self.fresh(peer)
        try:
            before = self.postgres.transactions(database)
            asked = {"count": count, "at_once": 32 if batch == 1 else 4, "batch": batch}
            adapter = Adapter(peer, "spawn", database, task=task, **asked)
            seconds = adapter.result()["seconds"]
            adapter.kill()
        finally:
            server.stop()
        time.sleep(0.3)
        transactions = self.postgres.transactions(database) - before
        return database, {"per_second": count / seconds, "transactions_per_task": transactions / count}

    def measure_spawn(self, peer):
        count = 10_000 if PEERS[peer].get("server") else 3000
        self.note(peer, "spawn", self.spawn(peer, int(count * self.scale))[1])

    def measure_batch(self, peer):
        self.note(peer, "batch", self.spawn(peer, int(50_000 * self.scale), batch=250)[1])

    def drain(self, peer, measure, task, count):
        database, _ = self.spawn(peer, count, batch=250 if PEERS[peer].get("batch") else 1, task=task)
        server = Server(peer, database)
        try:
            self.postgres.sql.execute("checkpoint")
            with psycopg.connect(machine.url(database), autocommit=True) as sql:
                sql.execute("vacuum analyze")
                before, (cpu, flushes) = self.postgres.transactions(database), self.postgres.cost()
                started = time.perf_counter()
                adapter = Adapter(peer, "work", database, task=task, count=count, settings=PEERS[peer]["work"])
                started = time.perf_counter()
                adapter.wait("handled", 180)
                while sql.execute(f"select exists ({PEERS[peer]['left']})").fetchone()[0]:
                    time.sleep(0.003)
                seconds = time.perf_counter() - started
                now, flushed = self.postgres.cost()
                adapter.kill()
        finally:
            server.stop()
        time.sleep(0.3)
        self.note(peer, measure, {
            "per_second": count / seconds, "tasks": count,
            "transactions_per_task": (self.postgres.transactions(database) - before) / count,
            "flushes_per_task": (flushed - flushes) / count, "postgres_cores": (now - cpu) / seconds})

    def measure_drain(self, peer):
        self.drain(peer, "drain", "noop", int(PEERS[peer]["tasks"] * self.scale))

    def measure_steps(self, peer):
        self.drain(peer, "steps", "steps", int(PEERS[peer]["steps"] * self.scale))

    def measure_steady(self, peer):
        database, server = self.fresh(peer)
        seconds = 6 * max(self.scale, 0.5)
        try:
            worker = Adapter(peer, "work", database, counter=str(COUNTER), settings=PEERS[peer]["work"])
            time.sleep(1.5)
            feeder = Adapter(
                peer, "feed", database, counter=str(COUNTER), seconds=seconds + 2, at_once=32, ahead=2000)
            time.sleep(1)
            handled = lambda: int.from_bytes(COUNTER.read_bytes(), "little")  # noqa: E731
            before, started = handled(), time.perf_counter()
            time.sleep(seconds)
            rate = (handled() - before) / (time.perf_counter() - started)
            feeder.kill()
            worker.kill()
        finally:
            server.stop()
        self.note(peer, "steady", {"per_second": rate})

    def measure_latency(self, peer):
        """With what the library comes with, and with what its documentation has for low latency."""
        for kind in ["default", "quick"]:
            if kind not in PEERS[peer]:
                continue
            env = PEERS[peer].get("quick_env") if kind == "quick" else None
            database, server = self.fresh(peer, "_quick" if env else "", env)
            try:
                worker = Adapter(peer, "work", database, env=env, settings=PEERS[peer][kind])
                time.sleep(2)
                pace = Adapter(peer, "pace", database, env=env, count=int(200 * max(self.scale, 0.5)), gap_ms=50)
                pace.result()
                pace.kill()
                time.sleep(2.5)
                latencies = sorted(worker.finish()["latencies"])
            finally:
                server.stop()
            at = lambda share: latencies[min(len(latencies) - 1, int(share * len(latencies)))]  # noqa: E731
            self.note(peer, "latency" if kind == "default" else "latency_quick", {
                "p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99), "samples": len(latencies)})

    def measure_idle(self, peer):
        """Fifty workers with nothing to do."""
        database, server = self.fresh(peer)
        each = PEERS[peer].get("idle")
        adapters = []
        try:
            for _ in range(10 if each else 1):
                adapters.append(Adapter(peer, "work", database, workers=each or 50))
            time.sleep(12)  # Idle sessions report what they did within ten seconds.
            seconds = 20 * max(self.scale, 0.5)
            before, (cpu, _), started = self.postgres.transactions(database), self.postgres.cost(), time.perf_counter()
            time.sleep(seconds)
            took = time.perf_counter() - started
            transactions, (now, _) = self.postgres.transactions(database) - before, self.postgres.cost()
            connections = self.postgres.sql.execute(
                "select count(*) from pg_stat_activity where datname = %s", (database,)).fetchone()[0]
        finally:
            for adapter in adapters:
                adapter.kill()
            server.stop()
        scale = 50 / len(adapters) if each else 1
        self.note(peer, "idle", {
            "transactions_per_second": transactions / took * scale, "connections": connections * scale,
            "postgres_cores": (now - cpu) / took * scale})

    # --- the limits of the machine -----------------------------------------------------------------------------------

    def pgbench(self, script, clients, batch):
        self.postgres.database("limits")
        with psycopg.connect(machine.url("limits"), autocommit=True) as sql:
            sql.execute((HERE / "sql/tables.sql").read_text())
        seconds = 5 if self.rounds > 1 else 2
        self.postgres.sql.execute("checkpoint")
        out = subprocess.run(
            [str(machine.programs() / "pgbench"), "-h", "127.0.0.1", "-p", machine.PORT, "-U", "postgres", "-n", "-M", "prepared",
             "-c", str(clients), "-j", "1", "-T", str(seconds), "-D", f"batch={batch}", "-f", str(HERE / "sql" / script),
             "limits"], capture_output=True, text=True, check=True).stdout
        if script != "lifecycle.sql":
            return float(re.search(r"tps = ([\d.]+)", out).group(1))
        # What was really completed, not what was asked for.
        with psycopg.connect(machine.url("limits")) as sql:
            return sql.execute("select count(*) from tasks where state = 'completed'").fetchone()[0] / seconds

    def store(self, clients, batch):
        """The same lifecycle through our store alone."""
        database, server = self.fresh("ours, gRPC")
        server.stop()
        out = subprocess.run(
            [str(TARGET / "absurd-lifecycle"), machine.url(database), str(clients), str(batch), "5" if self.rounds > 1 else "2"],
            stdout=subprocess.PIPE, text=True, check=True).stdout
        with psycopg.connect(machine.url(database)) as sql:
            assert sql.execute(f"select not exists ({OURS_LEFT})").fetchone()[0], "left over"
        return float(out)

    def limits(self):
        if "limits" not in self.measures:
            return
        plan = [(f"commit, {clients} at once", "commit.sql", clients, 1) for clients in (1, 8, 32)]
        plan += [("spawn, 32 at once", "spawn.sql", 32, 1)]
        plan += [(f"lifecycle, {batch} a batch", "lifecycle.sql", clients, batch)
                 for batch, clients in ((1, 32), (10, 8), (100, 4), (1000, 2))]
        for number in range(self.rounds):
            for name, script, clients, batch in plan:
                found = self.results["limits"].setdefault(name, {"sql": [], "store": []})
                found["sql"].append(self.pgbench(script, clients, batch))
                if script == "lifecycle.sql":
                    found["store"].append(self.store(clients, batch))
            self.say("limits round", number + 1, {
                name: {side: round(values[-1]) for side, values in found.items() if values}
                for name, found in self.results["limits"].items()})
            self.save()

    def run(self):
        started = time.time()
        able = lambda name: [peer for peer in self.peers if PEERS[peer].get(name)]  # noqa: E731
        self.limits()
        self.each("spawn", self.measure_spawn)
        self.each("batch", self.measure_batch, able("batch"))
        self.each("drain", self.measure_drain)
        self.each("steady", self.measure_steady)
        self.each("steps", self.measure_steps, able("steps"))
        self.each("latency", self.measure_latency)
        self.each("idle", self.measure_idle, rounds=1)
        self.results["about"]["seconds"] = round(time.time() - started)
        self.save()
        print(report.changes(self.results) if self.against else report.table(self.results))


if __name__ == "__main__":
    bench = Bench(arguments())
    try:
        bench.run()
    finally:
        bench.postgres.stop()
