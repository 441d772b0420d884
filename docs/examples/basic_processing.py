"""Basic processing, as with the original AbsurdClient, over gRPC: spawn tasks, claim them, complete or fail them.

    PYTHONPATH=generated python docs/examples/basic_processing.py
"""

import json
import os

import grpc
from absurd.v1 import absurd_service_pb2_grpc, claim_pb2, json_pb2, queue_pb2, settle_pb2, task_pb2

URL = os.environ.get("ABSURD_URL", "http://127.0.0.1:50051").removeprefix("http://")
QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "absurd_default")


def text(value):
    """JSON travels as text."""
    return json_pb2.Json(text=json.dumps(value))


def process_task(name, params):
    if name == "echo":
        return {"output": f"Processed: {params['message']}"}
    raise ValueError(f"nobody knows how to do {name}")


with grpc.insecure_channel(URL) as channel:
    absurd = absurd_service_pb2_grpc.AbsurdServiceStub(channel)
    absurd.CreateQueue(queue_pb2.CreateQueueRequest(queue=QUEUE))

    for name in ["echo", "sing"]:
        # One attempt is the original client's default.
        task = task_pb2.NewTask(task_name=name, params=text({"message": "Hello, World!"}), max_attempts=1)
        spawned = absurd.SpawnTask(task_pb2.SpawnTaskRequest(queue=QUEUE, task=task)).task
        print(f"spawned {name}: task {spawned.task_id}, run {spawned.run_id}")

    for task in absurd.ClaimTask(claim_pb2.ClaimTaskRequest(queue=QUEUE, worker_id="absurd_worker_1", qty=2)).tasks:
        claim = {"queue": QUEUE, "claim_token": task.claim_token}
        try:
            result = process_task(task.task_name, json.loads(task.params.text))
            absurd.CompleteTask(settle_pb2.CompleteTaskRequest(result=text(result), **claim))
            print(f"completed {task.task_name}: {result}")
        except Exception as error:
            # The handler failed, or the server refused its result.
            reason = {"name": type(error).__name__, "message": str(error)}
            absurd.FailTask(settle_pb2.FailTaskRequest(reason=text(reason), **claim))
            print(f"failed {task.task_name}: {error}")
