"""An order in Python: a step, a wait for an event, and the end, on the client that grpcio-tools generates from proto/.

    python -m grpc_tools.protoc -I proto --python_out=generated --grpc_python_out=generated proto/absurd/v1/*.proto
    PYTHONPATH=generated python docs/examples/order_worker.py [ORDERS]

Without ORDERS it works for ever.
"""

import json
import os
import sys
import time
import uuid

import grpc
from absurd.v1 import absurd_service_pb2_grpc, checkpoint_pb2, claim_pb2, event_pb2, json_pb2, settle_pb2
from google.protobuf.duration_pb2 import Duration

URL = os.environ.get("ABSURD_URL", "http://127.0.0.1:50051").removeprefix("http://")
QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "default")
LEASE = Duration(seconds=60)


class Suspended(Exception):
    """The run sleeps, and the claim is over."""


def step(absurd, task, name, action):
    """The stored value of the step; the first time, what the action returns."""
    for checkpoint in task.checkpoints:
        if checkpoint.checkpoint_name == name:
            return json.loads(checkpoint.state.text)
    value = action()
    absurd.SetCheckpoint(
        checkpoint_pb2.SetCheckpointRequest(
            queue=QUEUE,
            claim_token=task.claim_token,
            checkpoint_name=name,
            state=json_pb2.Json(text=json.dumps(value)),
            extend_by=LEASE,
        )
    )
    return value


def await_event(absurd, task, name, event):
    """The payload of the event, when it is there."""
    request = event_pb2.AwaitEventRequest(
        queue=QUEUE, claim_token=task.claim_token, step_name=name, event_name=event, timeout=Duration(seconds=86400)
    )
    answer = absurd.AwaitEvent(request)
    match answer.WhichOneof("outcome"):
        case "payload":
            return json.loads(answer.payload.text)
        case "suspended":
            raise Suspended
        case outcome:
            raise TimeoutError(f"{event}: {outcome}")


def fulfil(absurd, task):
    """The task. It runs from its beginning each time; what is stored is not done again."""
    order = json.loads(task.params.text)

    def charge():
        print(f"charged {order['order_id']}", flush=True)
        return {"payment": f"pay-{order['order_id']}"}

    payment = step(absurd, task, "charge", charge)
    shipment = await_event(absurd, task, "await-shipment", f"shipment.packed:{order['order_id']}")
    return {**payment, **shipment, "by": "python"}


def carry_out(absurd, task):
    """Runs one task and reports how it went; says whether it has ended."""
    try:
        result = json_pb2.Json(text=json.dumps(fulfil(absurd, task)))
        absurd.CompleteTask(settle_pb2.CompleteTaskRequest(queue=QUEUE, claim_token=task.claim_token, result=result))
        print(f"completed {task.task_id}", flush=True)
        return True
    except Suspended:
        print(f"suspended {task.task_id}", flush=True)
    except grpc.RpcError as error:
        # CLAIM_LOST, TASK_CANCELLED and the like: the run is not ours any more. Anything else: the lease ends, and it is tried
        # again.
        print(f"{task.task_id}: {error.details()}", file=sys.stderr)
    except Exception as error:
        reason = json_pb2.Json(text=json.dumps({"name": type(error).__name__, "message": str(error)}))
        absurd.FailTask(settle_pb2.FailTaskRequest(queue=QUEUE, claim_token=task.claim_token, reason=reason))
    return False


def main():
    left = int(sys.argv[1]) if len(sys.argv) > 1 else None
    request = claim_pb2.ClaimStreamRequest(
        queue=QUEUE, worker_id=f"python:{os.getpid()}", session_id=str(uuid.uuid4()), claim_timeout=LEASE
    )
    with grpc.insecure_channel(URL) as channel:
        absurd = absurd_service_pb2_grpc.AbsurdServiceStub(channel)
        while True:
            try:
                for response in absurd.ClaimStream(request):
                    if response.HasField("opened"):
                        print("ready", flush=True)
                    if response.HasField("task") and carry_out(absurd, response.task) and left is not None:
                        left -= 1
                        if left == 0:
                            return
            except grpc.RpcError as error:
                print(f"{error.code().name}, connecting again", file=sys.stderr)
            time.sleep(1)


if __name__ == "__main__":
    main()
