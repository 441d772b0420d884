"""Ours alone: more replicas, partitioned queues, an old snapshot, what each index costs, growth, extremes.

`bench/run own [--quick] [--rounds N] [--measures ...] [--out FILE]`"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psycopg

import machine
from peers import HERE, LISTEN, OURS_LEFT, TARGET, Adapter, Server, prepare, slug

GRPC = "ours, gRPC"
MEASURES = ["replicas", "partitioned", "snapshot", "autovacuum", "indexes", "growth", "extremes"]
FILL = """
with ids as materialized (
       select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run, i from generate_series(1, %(count)s::int) i),
     runs as (
       insert into absurd.r_q (run_id, task_id, attempt, state, available_at, completed_at)
       select run, task, 1, %(state)s, now() - interval '1 hour' + i * interval '1 us',
              case when %(state)s = 'completed' then now() - interval '1 hour' end from ids)
insert into absurd.t_q (task_id, task_name, params, state, attempts, max_attempts, last_attempt_run)
select task, 'noop', '{"id": 1, "pad": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "t": 0}', %(state)s,
       1, 1, run from ids
"""


class Own:
    def __init__(self, asked):
        self.rounds = 1 if asked.quick else asked.rounds
        self.tasks = 10_000 if asked.quick else 40_000
        self.quick = asked.quick
        self.measures = asked.measures.split(",")
        self.out = Path(asked.out)
        self.postgres = machine.Machine()
        self.results = {}
        prepare(self.postgres, GRPC)

    def note(self, measure, what, value):
        self.results.setdefault(measure, {}).setdefault(what, []).append(value)
        print(time.strftime("%H:%M:%S"), measure, what, value, file=sys.stderr, flush=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def fresh(self):
        database = self.postgres.database("own", slug(GRPC) + "_template")
        return database, psycopg.connect(machine.url(database), autocommit=True)

    def fill(self, sql, count, state="pending"):
        while count > 0:
            sql.execute(FILL, {"count": min(count, 50_000), "state": state})
            count -= 50_000
        sql.execute("vacuum analyze absurd.t_q")
        sql.execute("vacuum analyze absurd.r_q")
        self.postgres.sql.execute("checkpoint")

    def drain(self, database, sql, tasks, replicas=1, credit=2000):
        """Tasks per second of so many replicas with a worker process each."""
        host, port = LISTEN.split(":")
        listens = [f"{host}:{int(port) + number}" for number in range(replicas)]
        servers = [Server(GRPC, database, listen) for listen in listens]
        workers = []
        try:
            started = time.perf_counter()
            for listen in listens:
                env = {"ABSURD_URL": f"http://{listen}"}
                workers.append(Adapter(GRPC, "work", database, env=env, settings={"credit": credit // replicas}))
            while sql.execute(f"select exists ({OURS_LEFT})").fetchone()[0]:
                time.sleep(0.003)
            return round(tasks / (time.perf_counter() - started))
        finally:
            for process in workers:
                process.kill()
            for server in servers:
                server.stop()

    def replicas(self):
        for _ in range(self.rounds):
            for replicas in (1, 2, 4):
                database, sql = self.fresh()
                self.fill(sql, self.tasks)
                self.note("replicas", replicas, self.drain(database, sql, self.tasks, replicas))
                sql.close()

    def partitioned(self):
        for _ in range(self.rounds):
            for mode in ("unpartitioned", "partitioned"):
                database, sql = self.fresh()
                if mode == "partitioned":
                    sql.execute("select absurd.drop_queue('q')")
                    sql.execute("select absurd.create_queue('q', 'partitioned')")
                self.fill(sql, self.tasks)
                self.note("partitioned", mode, self.drain(database, sql, self.tasks))
                sql.close()

    def snapshot(self):
        """Four drains in a row, without and with a transaction that has been open since before the first."""
        for pinned in (False, True):
            database, sql = self.fresh()
            with psycopg.connect(machine.url(database)) as old:
                if pinned:
                    old.execute("set transaction isolation level repeatable read")
                    old.execute("select 1")
                for _ in range(4):
                    self.fill(sql, self.tasks)
                    rate = self.drain(database, sql, self.tasks)
                    self.note("snapshot", "pinned" if pinned else "free", rate)
            sql.close()

    def autovacuum(self):
        """Six drains in a row on a queue with a history, with the settings of the database and with eager ones."""
        for eager in (False, True):
            database, sql = self.fresh()
            if eager:
                for table in ("t_q", "r_q"):
                    sql.execute(f"alter table absurd.{table} set (autovacuum_vacuum_scale_factor = 0.01,"
                                " autovacuum_vacuum_cost_limit = 2000)")
            self.fill(sql, self.tasks * 20, "completed")
            for _ in range(6):
                sql.execute(FILL, {"count": self.tasks, "state": "pending"})
                self.note("autovacuum", "eager" if eager else "default", self.drain(database, sql, self.tasks))
            sql.close()

    def indexes(self):
        """The life of tasks in batches of 100, four callers, with one index less."""
        database, sql = self.fresh()
        secondary = [name for (name,) in sql.execute(
            "select indexname from pg_indexes where tablename in ('t_q', 'r_q') and indexdef not like '%UNIQUE%'"
            "   and indexname not like '%sai' order by 1")]
        sql.close()
        for _ in range(self.rounds):
            for dropped in [None, *secondary]:
                database, sql = self.fresh()
                if dropped:
                    sql.execute(f'drop index absurd."{dropped}"')
                out = subprocess.run(
                    [str(TARGET / "absurd-lifecycle"), machine.url(database), "4", "100", "2" if self.quick else "5"],
                    stdout=subprocess.PIPE, text=True, check=True).stdout
                self.note("indexes", dropped or "all", round(float(out)))
                if not dropped:
                    hot = sql.execute("select relname, n_tup_hot_upd::float8 / greatest(1, n_tup_upd) from pg_stat_user_tables"
                                      " where relname in ('t_q', 'r_q')").fetchall()
                    self.note("hot_updates", "share", {name: round(share, 2) for name, share in hot})
                sql.close()

    def growth(self):
        """So many tasks wait and so many have ended; then what 5,000 of them cost, and one claim."""
        sizes = [1000, 10_000, 100_000] if self.quick else [1000, 10_000, 100_000, 1_000_000, 3_000_000]
        sizes += [int(os.environ["BENCH_GROWTH"])] if "BENCH_GROWTH" in os.environ else []
        database, sql = self.fresh()
        there = 0
        for size in sizes:
            self.fill(sql, size - there, "completed")
            self.fill(sql, size - there)
            there = size
            server = Server(GRPC, database)
            try:
                worker = Adapter(GRPC, "take", database, count=min(5000, size // 2))
                found = worker.result(300)
                worker.kill()
            finally:
                server.stop()
            there -= min(5000, size // 2) + 200
            found["megabytes"] = sql.execute("select pg_database_size(current_database()) / 1048576").fetchone()[0]
            self.note("growth", size, found)
        sql.close()

    def extremes(self):
        database, sql = self.fresh()
        server = Server(GRPC, database)
        try:
            adapter = Adapter(GRPC, "extremes", database)
            found = adapter.result(600)
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            found["server_peak_mib"] = next(int(line.split()[1]) // 1024 for line in status.splitlines() if "VmHWM" in line)
            self.note("extremes", "all", found)
            adapter.kill()
        finally:
            server.stop()
            sql.close()

    def run(self):
        for measure in self.measures:
            getattr(self, measure)()
        for measure in ("replicas", "partitioned", "indexes"):
            if measure in self.results:
                print(measure, {what: statistics.median(values) for what, values in self.results[measure].items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, smaller")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measures", default=",".join(MEASURES), help="default: %(default)s")
    parser.add_argument("--out", default=str(HERE / "own.json"))
    own = Own(parser.parse_args())
    try:
        own.run()
    finally:
        own.postgres.stop()


if __name__ == "__main__":
    main()
