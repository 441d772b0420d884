"""A worker in Python, on the client that grpcio-tools generates from proto/: fulfils orders as they are pushed.

    python -m grpc_tools.protoc -I proto --python_out=generated --grpc_python_out=generated proto/absurd/v1/*.proto
    PYTHONPATH=generated python docs/examples/worker.py
"""

import json
import os
import sys
import time
import uuid

import grpc
from absurd.v1 import absurd_service_pb2_grpc, claim_pb2, json_pb2, settle_pb2

URL = os.environ.get("ABSURD_URL", "http://127.0.0.1:50051").removeprefix("http://")
QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "default")


def fulfil(order):
    """What this worker is for."""
    return {"order_id": order["order_id"], "tracking_number": f"TRACK-{order['order_id']}", "by": "python"}


def settle(stub, task):
    """Runs one task and reports how it went. The claim token proves that the task is still ours."""
    try:
        result = fulfil(json.loads(task.params.text))
        stub.CompleteTask(
            settle_pb2.CompleteTaskRequest(
                queue=QUEUE, claim_token=task.claim_token, result=json_pb2.Json(text=json.dumps(result))
            ),
            timeout=30,
        )
    except grpc.RpcError:
        raise
    except Exception as error:  # the task failed, not this worker
        reason = json.dumps({"name": type(error).__name__, "message": str(error)})
        stub.FailTask(
            settle_pb2.FailTaskRequest(queue=QUEUE, claim_token=task.claim_token, reason=json_pb2.Json(text=reason)),
            timeout=30,
        )


def work(stub, session_id):
    """Holds one stream to its end."""
    request = claim_pb2.ClaimStreamRequest(
        queue=QUEUE, worker_id=f"python:{os.getpid()}", session_id=session_id, max_in_flight=4
    )
    for response in stub.ClaimStream(request):
        kind = response.WhichOneof("message")
        if kind == "opened":
            print("python worker: ready", flush=True)
        elif kind == "task":
            settle(stub, response.task)
            print(f"python worker: completed {response.task.task_id}", flush=True)
        elif kind == "ending":
            time.sleep(response.ending.reconnect_after.ToTimedelta().total_seconds())


def main():
    session_id = str(uuid.uuid4())
    with grpc.insecure_channel(URL) as channel:
        stub = absurd_service_pb2_grpc.AbsurdServiceStub(channel)
        while True:
            try:
                work(stub, session_id)
            except grpc.RpcError as error:
                # Whatever ended the stream: connect again.
                print(f"python worker: {error.code().name}, connecting again", file=sys.stderr)
                time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
