"""pgqueuer: asyncio, LISTEN/NOTIFY, claims in batches, deletes finished tasks into a log."""

import json
import logging
import sys

import adapter
import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries

logging.disable(logging.CRITICAL)


async def setup():
    await Queries(AsyncpgDriver(await asyncpg.connect(adapter.URL))).install()


async def spawners(count):
    queries = Queries(AsyncpgPoolDriver(await asyncpg.create_pool(adapter.URL, min_size=count, max_size=count)))

    async def call(tasks):
        payloads = [json.dumps(task).encode() for task in tasks]
        if len(payloads) == 1:
            await queries.enqueue("noop", payloads[0], 0)
        else:
            await queries.enqueue(["noop"] * len(payloads), payloads, [0] * len(payloads))

    return [call] * count


async def worker(settings):
    app = PgQueuer.from_asyncpg_pool(await asyncpg.create_pool(adapter.URL, min_size=2, max_size=settings.get("pool", 4)))

    @app.entrypoint("noop")
    async def noop(job):
        adapter.handled(json.loads(job.payload))

    more = {"batch_size": settings["batch"]} if "batch" in settings else {}
    return lambda: app.run(**more)


adapter.main(sys.modules[__name__])
