"""The original Python SDK, asynchronous flavour: what its documentation promises, against the database in
ABSURD_DATABASE_URL. The argument is the storage mode of the queue."""

import asyncio
import os
import sys

from absurd_sdk import AsyncAbsurd, TimeoutError

MODE = sys.argv[1]
QUEUE = f"sdk async {MODE}"


async def main():
    app = AsyncAbsurd(os.environ["ABSURD_DATABASE_URL"], queue_name=QUEUE)
    await app.create_queue(storage_mode=MODE, cleanup_ttl="90 days")
    assert (await app.get_queue_policy())["cleanup_ttl"].days == 90
    calls = []

    @app.register_task(name="all")
    async def everything(params, ctx):
        async def count(n):
            calls.append(n)
            return {"n": n}

        first = await ctx.step("same", lambda: count(1))
        second = await ctx.step("same", lambda: count(2))
        handle = await ctx.begin_step("manual")
        if not handle.done:
            await ctx.complete_step(handle, None)
        await ctx.sleep_for("nap", 0)
        await ctx.heartbeat(30)
        await ctx.emit_event("from the task", {"by": str(ctx.task_id)})
        woken = await ctx.await_event("to the task")
        try:
            await ctx.await_event("never", timeout=0)
            raise AssertionError("there was no event")
        except TimeoutError:
            pass
        if len(calls) == 2:
            calls.append("crash")
            raise ValueError("on purpose")
        return [first, second, woken, params]

    spawned = await app.spawn("all", {"p": [1]}, max_attempts=2, headers={"h": 1})

    async def state():
        return await app.fetch_task_result(spawned["task_id"])

    for _ in range(4):
        await app.work_batch("w", 60, 1)
    assert (await state()).state == "sleeping", await state()
    await app.emit_event("to the task", "hello")
    # The run wakes, waits for the other event, times out, fails, and is carried out once more.
    for _ in range(8):
        await app.work_batch("w", 60, 1)
    end = await app.await_task_result(spawned["task_id"], timeout=30)
    assert end.state == "completed", end
    assert end.result == [{"n": 1}, {"n": 2}, "hello", {"p": [1]}], end
    assert calls == [1, 2, "crash"], calls

    # A worker in the background, many tasks at once, stopped politely.
    @app.register_task(name="double")
    async def double(params, ctx):
        return params * 2

    tasks = [await app.spawn("double", n) for n in range(30)]
    worker = asyncio.create_task(app.start_worker(concurrency=5, poll_interval=0.02))
    ends = [await app.await_task_result(task["task_id"], timeout=30) for task in tasks]
    assert [end.result for end in ends] == [n * 2 for n in range(30)], ends
    app.stop_worker()
    await worker

    cancelled = await app.spawn("double", 1)
    await app.cancel_task(cancelled["task_id"])
    assert (await app.fetch_task_result(cancelled["task_id"])).state == "cancelled"
    await app.drop_queue()
    assert QUEUE not in await app.list_queues()
    await app.close()
    print("ok")


asyncio.run(main())
