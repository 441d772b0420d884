"""An order in Python: a step, a wait for an event, and the end, on the client that grpcio-tools generates from proto/.

    pip install grpcio grpcio-tools grpcio-status
    mkdir -p generated
    python -m grpc_tools.protoc -I proto --python_out=generated --grpc_python_out=generated proto/absurd/v1/*.proto
    PYTHONPATH=generated python docs/examples/order_worker.py [ORDERS]

Without ORDERS it works for ever. The parcel of each order contains the text of the file that GREETING names. An order
with the field `replaces` cancels the task that it names.
"""

import json
import os
import pathlib
import sys
import time
import traceback
import uuid

import grpc
from absurd.v1 import absurd_service_pb2_grpc, checkpoint_pb2, claim_pb2, event_pb2, json_pb2, settle_pb2, task_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc import StatusCode
from grpc_status import rpc_status

URL = os.environ.get("ABSURD_URL", "http://127.0.0.1:50051").removeprefix("http://")
QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "default")
LEASE = 60
# Without pings a dead connection is never noticed.
PINGS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]

# Reasons: the run belongs to this worker no longer.
LOST = {"CLAIM_LOST", "CLAIM_EXPIRED", "TASK_CANCELLED", "RUN_NOT_RUNNING", "RUN_NOT_FOUND"}
# Codes: the server is away or busy. A repeated call has one effect.
PASSING = {
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNKNOWN,
    StatusCode.CANCELLED,
}


class ClaimOver(BaseException):
    """The claim is over: report nothing. It is no `Exception`, so that a handler does not catch it by accident."""


class Suspended(ClaimOver):
    """The run sleeps."""


class Refused(Exception):
    """The server refused a call of this worker. The same call would be refused again."""


def reason_of(error):
    """The reason of a gRPC error, such as JSON_INVALID. An error that no server of Absurd's made has its code alone."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    named = status is not None and any(detail.Unpack(info) for detail in status.details)
    return info.reason if named else error.code().name


class Run:
    """One execution of a task: the calls that this worker makes about it."""

    def __init__(self, absurd, task):
        self.absurd = absurd
        self.task = task
        self.lease_end = time.monotonic() + LEASE
        self.claim = {"queue": QUEUE, "claim_token": task.claim_token}
        self.stored = None

    def call(self, method, request):
        """Makes a call, and repeats it until the server answers or the lease ends."""
        pause = 0.1
        while True:
            left = self.lease_end - time.monotonic()
            try:
                return method(request, timeout=min(10, max(left, 1)))
            except grpc.RpcError as error:
                reason, passes = reason_of(error), error.code() in PASSING
                message = f"{reason}: {error.details()}"
                if reason in LOST or (passes and left < pause):
                    raise ClaimOver(message) from error
                if not passes:
                    raise Refused(message) from error
                print(f"{message}; trying again", file=sys.stderr)
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def checkpoints(self):
        """The values of the steps that earlier executions stored, by name."""
        if self.task.checkpoints_complete:
            return {stored.checkpoint_name: stored.state for stored in self.task.checkpoints}
        request = checkpoint_pb2.GetAllCheckpointsRequest(queue=QUEUE, run_id=self.task.run_id)
        values = {}
        while True:
            page = self.call(self.absurd.GetAllCheckpoints, request)
            values |= {stored.checkpoint_name: stored.state for stored in page.checkpoints}
            request.page_token = page.next_page_token
            if not request.page_token:
                return values

    def step(self, name, action):
        """Returns the stored value of the step. The first time, calls the action and stores its value."""
        if self.stored is None:
            self.stored = self.checkpoints()
        if name in self.stored:
            return json.loads(self.stored[name].text or "null")
        state = json_pb2.Json(text=json.dumps(action()))
        request = checkpoint_pb2.SetCheckpointRequest(
            checkpoint_name=name, state=state, extend_by=Duration(seconds=LEASE), **self.claim
        )
        begun = time.monotonic()
        self.call(self.absurd.SetCheckpoint, request)
        self.lease_end = begun + LEASE
        self.stored[name] = state
        return json.loads(state.text)

    def await_event(self, name, event):
        """Returns the payload of the event. While there is none, the run sleeps and this execution ends."""
        request = event_pb2.AwaitEventRequest(
            step_name=name, event_name=event, timeout=Duration(seconds=86400), **self.claim
        )
        answer = self.call(self.absurd.AwaitEvent, request)
        match answer.WhichOneof("outcome"):
            case "payload":
                return json.loads(answer.payload.text)
            case "suspended":
                raise Suspended
            case outcome:
                raise TimeoutError(f"{event}: {outcome}")

    def complete(self, value):
        result = json_pb2.Json(text=json.dumps(value))
        self.call(self.absurd.CompleteTask, settle_pb2.CompleteTaskRequest(result=result, **self.claim))

    def fail(self, error):
        """Records a failure. The server cleans the reason and keeps 64 KiB of it."""
        trace = "".join(traceback.format_exception(error))
        reason = {"name": type(error).__name__, "message": str(error)[:10_000], "traceback": trace[-10_000:]}
        request = settle_pb2.FailTaskRequest(reason=json_pb2.Json(text=json.dumps(reason)), **self.claim)
        self.call(self.absurd.FailTask, request)


def fulfil(run):
    """The handler. It runs from its beginning each time; a stored step is not done again."""
    order = json.loads(run.task.params.text)

    def charge():
        print(f"charged {order['order_id']}", flush=True)
        return {"payment": f"pay-{order['order_id']}"}

    payment = run.step("charge", charge)
    if "replaces" in order:
        # A call of the handler's own. Its errors are failures of the task, as those of any other service are.
        run.absurd.CancelTask(task_pb2.CancelTaskRequest(queue=QUEUE, task_id=order["replaces"]))
    shipment = run.await_event("await-shipment", f"shipment.packed:{order['order_id']}")
    if "GREETING" in os.environ:
        shipment["greeting"] = pathlib.Path(os.environ["GREETING"]).read_text(encoding="utf-8")
    return {**payment, **shipment, "by": "python"}


def carry_out(run):
    """Runs one task and reports how it went; says whether it is completed."""
    task_id = run.task.task_id
    try:
        try:
            run.complete(fulfil(run))
            print(f"completed {task_id}", flush=True)
            return True
        except Exception as error:
            # The handler failed, or the server refused a value that the handler made. Either way the attempt ends here.
            run.fail(error)
            print(f"failed {task_id}: {error}", file=sys.stderr)
    except Suspended:
        print(f"suspended {task_id}", flush=True)
    except (ClaimOver, Refused) as error:
        print(f"{task_id}: {error}", file=sys.stderr)
    return False


def main():
    left = int(sys.argv[1]) if len(sys.argv) > 1 else None
    request = claim_pb2.ClaimStreamRequest(
        queue=QUEUE,
        worker_id=f"python:{os.getpid()}",
        session_id=str(uuid.uuid4()),
        claim_timeout=Duration(seconds=LEASE),
    )
    with grpc.insecure_channel(URL, options=PINGS) as channel:
        absurd = absurd_service_pb2_grpc.AbsurdServiceStub(channel)
        while True:
            try:
                for response in absurd.ClaimStream(request):
                    if response.HasField("opened"):
                        print("ready", flush=True)
                    if response.HasField("task") and carry_out(Run(absurd, response.task)) and left is not None:
                        left -= 1
                        if left == 0:
                            return
            except grpc.RpcError as error:
                print(f"{error.code().name}, connecting again", file=sys.stderr)
            time.sleep(1)


if __name__ == "__main__":
    main()
