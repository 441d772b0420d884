"""The Python SDK's worker for durable_figures: each task does as many steps as its params say."""

import asyncio
import os
import sys

from absurd_sdk import Absurd, AsyncAbsurd

URL, CONCURRENCY = os.environ["ABSURD_DATABASE_URL"], int(os.environ["CONCURRENCY"])

if sys.argv[1] == "async":

    async def main():
        app = AsyncAbsurd(URL, queue_name="q")

        @app.register_task(name="steps")
        async def steps(params, ctx):
            async def one():
                return {"n": 1}

            for _ in range(params["steps"]):
                await ctx.step("s", one)
            return {"done": True}

        await app.start_worker(concurrency=CONCURRENCY, poll_interval=0.05)

    asyncio.run(main())
else:
    app = Absurd(URL, queue_name="q")

    @app.register_task(name="steps")
    def steps(params, ctx):
        for _ in range(params["steps"]):
            ctx.step("s", lambda: {"n": 1})
        return {"done": True}

    app.start_worker(concurrency=CONCURRENCY, poll_interval=0.05)
