"""The original Python SDK, blocking flavour: what its documentation promises, against the database in
ABSURD_DATABASE_URL. The argument is the storage mode of the queue."""

import os
import sys
import uuid

from absurd_sdk import Absurd, TimeoutError

MODE = sys.argv[1]
QUEUE = f"sdk sync {MODE}"
CHILDREN = f"children sync {MODE}"
runs = []


def before_spawn(name, params, options):
    return {**options, "headers": {**(options.get("headers") or {}), "trace": f"t-{name}"}}


def wrap(ctx, execute):
    runs.append(("begin", ctx.headers.get("trace")))
    try:
        return execute()
    finally:
        runs.append(("end", ctx.headers.get("trace")))


app = Absurd(
    os.environ["ABSURD_DATABASE_URL"],
    queue_name=QUEUE,
    hooks={"before_spawn": before_spawn, "wrap_task_execution": wrap},
)
app.create_queue(storage_mode=MODE, cleanup_ttl="90 days", cleanup_limit=77, detach_mode="empty")
app.create_queue(CHILDREN)
policy = app.get_queue_policy()
assert (policy["storage_mode"], policy["cleanup_ttl"].days, policy["cleanup_limit"], policy["detach_mode"]) == (
    MODE,
    90,
    77,
    "empty",
), policy
app.set_queue_policy(cleanup_limit=78)
assert app.get_queue_policy()["cleanup_limit"] == 78
assert {QUEUE, CHILDREN} <= set(app.list_queues())


def work(count=1):
    app.work_batch("worker-1", 60, count)


def end(spawned, queue=None):
    snapshot = app.fetch_task_result(spawned["task_id"], queue_name=queue)
    return snapshot.state, snapshot.result


# Steps: repeated names, decomposed steps, and what a retry finds.
calls = []


@app.register_task(name="steps", default_max_attempts=3)
def steps(params, ctx):
    values = [ctx.step("same", lambda n=n: calls.append(n) or {"n": n}) for n in range(3)]
    handle = ctx.begin_step("manual")
    if not handle.done:
        calls.append("manual")
        ctx.complete_step(handle, ["a", None, 1.5])
    ctx.heartbeat()
    if len(calls) < 5:
        calls.append("crash")
        raise ValueError("on purpose")
    return {"values": values, "manual": ctx.begin_step("manual2").done, "params": params}


spawned = app.spawn("steps", {"x": "ü"}, retry_strategy={"kind": "none"})
work()
work()
state, result = end(spawned)
assert state == "completed", (state, app.fetch_task_result(spawned["task_id"]))
assert result == {"values": [{"n": 0}, {"n": 1}, {"n": 2}], "manual": False, "params": {"x": "ü"}}, result
assert calls == [0, 1, 2, "manual", "crash"], calls
assert runs == [("begin", "t-steps"), ("end", "t-steps")] * 2, runs


# Sleeps.
@app.register_task(name="sleeper")
def sleeper(params, ctx):
    before = ctx.step("before", lambda: str(uuid.uuid4()))
    ctx.sleep_for("nap", params["seconds"])
    return before


short, long = app.spawn("sleeper", {"seconds": 0}), app.spawn("sleeper", {"seconds": 3600})
work(2)
work(2)
assert end(long)[0] == "sleeping", end(long)
assert end(short)[0] == "completed", end(short)
app.cancel_task(long["task_id"])
app.cancel_task(long["task_id"])
assert end(long)[0] == "cancelled"


# Events: before, after, never.
@app.register_task(name="waiter")
def waiter(params, ctx):
    try:
        return ctx.await_event(params["event"], timeout=params.get("timeout"))
    except TimeoutError:
        return "timed out"


app.emit_event("early", {"v": 1})
app.emit_event("early", {"v": 2})
early = app.spawn("waiter", {"event": "early"})
late = app.spawn("waiter", {"event": "late"})
never = app.spawn("waiter", {"event": "never", "timeout": 0})
work(3)
work(3)
assert end(early) == ("completed", {"v": 1}), end(early)
assert end(late)[0] == "sleeping", end(late)
assert end(never) == ("completed", "timed out"), end(never)
app.emit_event("late", [1, "two"])
work()
assert end(late) == ("completed", [1, "two"]), end(late)


# Retries: exhausted, in place, as a new task; idempotency keys.
@app.register_task(name="fails")
def fails(params, ctx):
    raise RuntimeError("always")


failing = app.spawn("fails", None, max_attempts=2, retry_strategy={"kind": "fixed", "base_seconds": 0})
work()
work()
snapshot = app.fetch_task_result(failing["task_id"])
assert (snapshot.state, snapshot.failure["message"]) == ("failed", "always"), snapshot
again = app.retry_task(failing["task_id"])
assert (again["task_id"], again["attempt"], again["created"]) == (failing["task_id"], 3, False), again
work()
copy = app.retry_task(failing["task_id"], spawn_new=True, max_attempts=1)
assert copy["task_id"] != failing["task_id"] and copy["created"], copy
work()
first = app.spawn("steps", 1, idempotency_key="once")
second = app.spawn("steps", 2, idempotency_key="once")
assert first["task_id"] == second["task_id"], (first, second)
work()


# A parent that spawns into another queue and waits for the result.
@app.register_task(name="parent")
def parent(params, ctx):
    child = ctx.step("spawn", lambda: str(app.spawn("child", 20, queue=CHILDREN)["task_id"]))
    with_children.work_batch("children", 60, 1)
    return ctx.await_task_result(child, queue_name=CHILDREN, timeout=30).result


with_children = Absurd(os.environ["ABSURD_DATABASE_URL"], queue_name=CHILDREN)


@with_children.register_task(name="child", queue=CHILDREN)
def child(params, ctx):
    return params + 1


spawned = app.spawn("parent", None)
for _ in range(5):
    work()
assert end(spawned) == ("completed", 21), end(spawned)

# What nobody handles is put off, not failed.
unknown = app.spawn("nobody knows it", None, queue=QUEUE)
for _ in range(5):
    work()
assert end(unknown)[0] in ("sleeping", "pending"), end(unknown)

app.drop_queue(CHILDREN)
app.drop_queue()
assert not {QUEUE, CHILDREN} & set(app.list_queues())
print("ok")
