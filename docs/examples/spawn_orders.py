"""An application that uses the original SDK: it stores orders and spawns their tasks in one transaction of its own.

    pip install absurd-sdk 'psycopg[binary]'
    ABSURD_DATABASE_URL=postgresql://... python docs/examples/spawn_orders.py 4
"""

import os
import sys

import psycopg
from absurd_sdk import Absurd

QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "default")


def main(count):
    with psycopg.connect(os.environ["ABSURD_DATABASE_URL"]) as connection:
        with connection.transaction():
            connection.execute("create table if not exists orders (order_id text primary key, amount int)")
        app = Absurd(connection, queue_name=QUEUE)

        spawned = []
        with connection.transaction():
            # Order and task are committed together, or not at all.
            for number in range(1, count + 1):
                order_id = f"{os.getpid()}-{number}"
                connection.execute("insert into orders values (%s, %s)", (order_id, 100 * number))
                params = {"order_id": order_id, "amount": 100 * number, "items": ["widget"], "email": "a@example.com"}
                spawned.append(app.spawn("order-fulfillment", params, queue=QUEUE)["task_id"])
        print(f"application: spawned {len(spawned)} tasks in the transaction of their orders", flush=True)

        # The SDK reads results in a transaction of ours; leave it between reads.
        connection.autocommit = True
        for task_id in spawned:
            end = app.await_task_result(task_id, timeout=60)
            print(f"application: {task_id} {end.state} {end.result}", flush=True)
            if end.state != "completed":
                sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
