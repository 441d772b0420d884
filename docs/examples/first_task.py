"""A first task: spawned, pushed, completed, on the client that grpcio-tools generates from proto/."""

import json
import os

import grpc
from absurd.v1 import absurd_service_pb2_grpc, claim_pb2, json_pb2, queue_pb2, settle_pb2, task_pb2

URL = os.environ.get("ABSURD_URL", "http://127.0.0.1:50051").removeprefix("http://")
QUEUE = "first"


def text(value):
    """JSON travels as text."""
    return json_pb2.Json(text=json.dumps(value))


def greet(params):
    """The handler."""
    return {"greeting": f"hello {params['name']}"}


def carry_out(absurd, task):
    """Runs the task and ends the run. Without an end the run would stay open until its lease is over."""
    claim = {"queue": QUEUE, "claim_token": task.claim_token}
    try:
        result = greet(json.loads(task.params.text))
        absurd.CompleteTask(settle_pb2.CompleteTaskRequest(result=text(result), **claim))
    except Exception as error:
        # The handler failed, or the server refused its result, such as one that is too large.
        reason = {"name": type(error).__name__, "message": str(error)}
        absurd.FailTask(settle_pb2.FailTaskRequest(reason=text(reason), **claim))


with grpc.insecure_channel(URL) as channel:
    absurd = absurd_service_pb2_grpc.AbsurdServiceStub(channel)
    absurd.CreateQueue(queue_pb2.CreateQueueRequest(queue=QUEUE))
    task = task_pb2.NewTask(task_name="greet", params=text({"name": "world"}), max_attempts=1)
    spawned = absurd.SpawnTask(task_pb2.SpawnTaskRequest(queue=QUEUE, task=task))

    # The server pushes a task as soon as there is one.
    for response in absurd.ClaimStream(claim_pb2.ClaimStreamRequest(queue=QUEUE, worker_id="python")):
        if response.HasField("task"):
            carry_out(absurd, response.task)
            break

    end = absurd.AwaitTaskResult(task_pb2.AwaitTaskResultRequest(queue=QUEUE, task_id=spawned.task.task_id))
    print(task_pb2.State.Name(end.result.state), end.result.result.text or end.result.failure_reason.text)
