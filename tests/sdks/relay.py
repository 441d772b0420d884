"""One runner of a relay, on the original Python SDK: its task is carried on by workers of several languages in turn.
HOLD names the step that it stays in until it is killed."""

import os
import time

from absurd_sdk import Absurd

app = Absurd(os.environ["ABSURD_DATABASE_URL"], queue_name="q")


@app.register_task(name="relay", queue="q")
def relay(params, ctx):
    def leg(number):
        def run():
            print(f"step {number}", flush=True)
            if os.environ.get("HOLD") == str(number):
                time.sleep(3600)
            return {"n": number, "by": "python"}

        return ctx.step("same", run)

    legs = [leg(1), leg(2)]
    half = ctx.begin_step("half")
    if not half.done:
        ctx.complete_step(half, [None, 1.5, "ü"])
    ctx.sleep_for("nap", 1)
    legs.append(leg(3))
    event = ctx.await_event(f"go:{ctx.task_id}")
    child = ctx.await_task_result(params["child"], queue_name="children")
    legs.append(leg(4))
    return {"legs": legs, "half": half.state, "event": event, "child": child.result}


print("ready", flush=True)
app.start_worker(claim_timeout=2, poll_interval=0.05)
