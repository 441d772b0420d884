"""What the Python adapters share: the commands of the benchmark (see ../README.md), over a module that knows its library.

The module has: `setup()`, `spawners(count)` (coroutine functions that each take a list of params), `worker(settings)` (a
coroutine function that works until it is cancelled)."""

import asyncio
import json
import os
import sys
import time

URL = os.environ["BENCH_DATABASE_URL"]
TASK = os.environ.get("BENCH_TASK", "noop")
PAD = "x" * 70

_count = 0
_latencies = []
_wanted = None
_counter = None


def params(index, at=0):
    return {"id": index, "pad": PAD, "t": at}


def handled(task):
    """To be called by the handler of each task."""
    global _count
    if task["t"]:
        _latencies.append((time.monotonic_ns() - task["t"]) / 1e6)
    _count += 1
    if _counter is not None:
        os.pwrite(_counter, _count.to_bytes(8, "little"), 0)
    if _count == _wanted:
        say("handled")


def say(line):
    print(line, flush=True)


def end(result):
    say("result " + json.dumps(result))
    os._exit(0)


async def _spawn(module, asked):
    callers = await module.spawners(asked.get("at_once", 1))
    batch, count, ahead = asked.get("batch", 1), asked.get("count"), asked.get("ahead", 0)
    following = 0
    say("ready")
    started = time.perf_counter()
    until = started + asked["seconds"] if "seconds" in asked else None

    async def call(caller):
        nonlocal following
        while until is None or time.perf_counter() < until:
            if until is not None and following >= int.from_bytes(os.pread(_counter, 8, 0), "little") + ahead:
                await asyncio.sleep(0.002)
                continue
            if count is not None and following >= count:
                return
            first, following = following, following + batch
            await caller([params(first + offset) for offset in range(batch)])

    await asyncio.gather(*map(call, callers))
    end({"seconds": time.perf_counter() - started})


async def _pace(module, asked):
    (caller,) = await module.spawners(1)
    await caller([params(0)])
    say("ready")
    following = time.perf_counter() + 0.5
    for index in range(asked["count"]):
        await asyncio.sleep(max(0, following - time.perf_counter()))
        following += asked["gap_ms"] / 1000
        await caller([params(index, time.monotonic_ns())])
    end({})


async def _work(module, asked):
    workers = [await module.worker(asked.get("settings", {})) for _ in range(asked.get("workers", 1))]
    say("ready")
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, lambda: (sys.stdin.read(1), end({"latencies": _latencies})))
    await asyncio.gather(*(worker() for worker in workers))


def main(module):
    global _wanted, _counter
    command, asked = sys.argv[1], json.loads(sys.argv[2])
    _wanted = asked.get("count")
    if "counter" in asked:
        _counter = os.open(asked["counter"], os.O_RDWR)

    async def run():
        if command == "setup":
            await module.setup()
            end({})
        await {"spawn": _spawn, "feed": _spawn, "pace": _pace, "work": _work}[command](module, asked)

    asyncio.run(run())
