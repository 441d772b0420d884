"""Absurd's own SDK for Python, asyncio flavour."""

import sys

import adapter
from absurd_sdk import AsyncAbsurd


async def setup():
    await AsyncAbsurd(adapter.URL, queue_name="q").create_queue("q")


async def spawners(count):
    def caller():
        app = AsyncAbsurd(adapter.URL, queue_name="q")

        async def call(tasks):
            for task in tasks:
                await app.spawn(adapter.TASK, task, queue="q")

        return call

    return [caller() for _ in range(count)]


async def worker(settings):
    app = AsyncAbsurd(adapter.URL, queue_name="q")

    @app.register_task("noop")
    async def noop(task, ctx):
        adapter.handled(task)
        return {"ok": True}

    @app.register_task("steps")
    async def steps(task, ctx):
        for index in range(10):

            async def step():
                return {"i": index}

            await ctx.step(f"s{index}", step)
        adapter.handled(task)
        return {"ok": True}

    return lambda: app.start_worker(**settings)


adapter.main(sys.modules[__name__])
