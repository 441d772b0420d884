"""The original SDK's own worker: carries out the tasks that somebody spawned over gRPC.

    pip install absurd-sdk 'psycopg[binary]'
    ABSURD_DATABASE_URL=postgresql://... python docs/examples/sdk_worker.py
"""

import os

from absurd_sdk import Absurd

QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "default")
app = Absurd(os.environ["ABSURD_DATABASE_URL"], queue_name=QUEUE)


@app.register_task(name="order-fulfillment", queue=QUEUE)
def process_order(params, ctx):
    payment = ctx.step("process-payment", lambda: {"id": f"pay-{params['order_id']}", "amount": params["amount"]})
    ctx.step("reserve-inventory", lambda: {"reserved": params["items"]})
    shipment = ctx.await_event(f"shipment.packed:{params['order_id']}")
    ctx.step("send-notification", lambda: {"sent_to": params["email"]})
    return {"order_id": payment["id"], "tracking_number": shipment["tracking_number"]}


if __name__ == "__main__":
    print("sdk worker: ready", flush=True)
    app.start_worker(poll_interval=0.05)
