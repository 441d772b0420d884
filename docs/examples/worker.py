"""A worker in Python, on the client that grpcio-tools generates from proto/: fulfils orders as they are pushed.

It has all the duties of docs/clients.md: several tasks at a time, leases that last as long as their tasks, a watch over
silent streams, draining on SIGTERM. order_worker.py has steps and waits.

    pip install grpcio grpcio-tools
    mkdir -p generated
    python -m grpc_tools.protoc -I proto --python_out=generated --grpc_python_out=generated proto/absurd/v1/*.proto
    PYTHONPATH=generated python docs/examples/worker.py
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
from absurd.v1 import absurd_service_pb2_grpc, claim_pb2, json_pb2, settle_pb2
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

URL = os.environ.get("ABSURD_URL", "http://127.0.0.1:50051").removeprefix("http://")
QUEUE = os.environ.get("ABSURD_DEFAULT_QUEUE", "default")
CONCURRENCY = 4
# Without pings a dead connection is used again for the next stream.
PINGS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
# The server is away or busy. A repeated call has one effect.
PASSING = {
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNKNOWN,
    StatusCode.CANCELLED,
}


def fulfil(order):
    """The handler."""
    time.sleep(order.get("packing_seconds", 0))
    return {"order_id": order["order_id"], "tracking_number": f"TRACK-{order['order_id']}", "by": "python"}


def seconds(duration):
    return duration.ToTimedelta().total_seconds()


class Worker:
    def __init__(self, stub):
        self.stub = stub
        self.session_id = str(uuid.uuid4())
        self.pool = ThreadPoolExecutor(CONCURRENCY)
        self.stopping = threading.Event()
        # The end of the lease of each claim, by its token: from the receipt of the task to the report of its outcome.
        self.held = {}
        # The server decides the timers. These values count until it has said so.
        self.lease, self.extend_interval, self.heartbeat_interval = 10, 3, 15
        self.stream, self.heard = None, time.monotonic()

    def run(self):
        """Holds one stream after the other until the worker stops. Then lets the tasks in flight finish."""
        while not self.stopping.is_set():
            pause = 1
            try:
                pause = self.hold_stream()
            except grpc.RpcError as error:
                if not self.stopping.is_set():
                    print(f"python worker: {error.code().name}, connecting again", file=sys.stderr)
            self.stopping.wait(pause)
        self.pool.shutdown(wait=True)

    def hold_stream(self):
        """Takes tasks from one stream to its end; returns the pause before the next stream."""
        request = claim_pb2.ClaimStreamRequest(
            queue=QUEUE,
            worker_id=f"python:{os.getpid()}",
            session_id=self.session_id,
            max_in_flight=CONCURRENCY,
            claim_timeout=Duration(seconds=10),
            held_claim_tokens=list(self.held),
        )
        self.heard = time.monotonic()
        self.stream = self.stub.ClaimStream(request)
        for response in self.stream:
            self.heard = time.monotonic()
            match response.WhichOneof("message"):
                case "opened":
                    self.lease = seconds(response.opened.claim_timeout)
                    self.extend_interval = seconds(response.opened.extend_interval)
                    self.heartbeat_interval = seconds(response.opened.heartbeat_interval)
                    self.note(response.opened.held)
                    print("python worker: ready", flush=True)
                case "task":
                    self.held[response.task.claim_token] = self.heard + self.lease
                    self.pool.submit(self.carry_out, response.task)
                case "revoked":
                    self.held.pop(response.revoked.claim_token, None)
                case "ending":
                    if response.ending.reason in (claim_pb2.END_REASON_DRAINED, claim_pb2.END_REASON_SUPERSEDED):
                        self.stopping.set()
                    return seconds(response.ending.reconnect_after)
        return 1

    def keep(self):
        """Extends the leases of all held claims, and ends a stream that was silent for three heartbeats."""
        extended = time.monotonic()
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if self.stream is not None and now - self.heard > 3 * self.heartbeat_interval:
                self.stream.cancel()
            if self.held and now - extended > self.extend_interval:
                claims = [settle_pb2.ClaimRef(claim_token=token) for token in list(self.held)]
                try:
                    request = settle_pb2.ExtendClaimsRequest(queue=QUEUE, claims=claims)
                    self.note(self.stub.ExtendClaims(request, timeout=5).verdicts)
                    extended = now
                except grpc.RpcError as error:
                    print(f"python worker: cannot extend leases: {error.details()}", file=sys.stderr)

    def note(self, verdicts):
        """Keeps the claims that hold, and forgets those that are over."""
        for verdict in verdicts:
            if verdict.verdict == claim_pb2.VERDICT_HELD and verdict.claim_token in self.held:
                self.held[verdict.claim_token] = time.monotonic() + self.lease
            elif verdict.verdict not in (claim_pb2.VERDICT_HELD, claim_pb2.VERDICT_BUSY):
                self.held.pop(verdict.claim_token, None)

    def carry_out(self, task):
        """Runs one task and reports how it went. The claim token proves that the run is still this worker's."""
        claim = {"queue": QUEUE, "claim_token": task.claim_token}
        try:
            try:
                result = json_pb2.Json(text=json.dumps(fulfil(json.loads(task.params.text))))
            except BaseException as error:
                # Also a grpc.RpcError, since no call of this worker's stands in this `try`; and sys.exit, which would end
                # this thread alone.
                self.fail(claim, type(error).__name__, str(error), traceback.format_exc())
                return
            try:
                self.call(self.stub.CompleteTask, settle_pb2.CompleteTaskRequest(result=result, **claim))
                print(f"python worker: completed {task.task_id}", flush=True)
            except grpc.RpcError as error:
                # Such as a result that is too large. If the claim is over, FailTask is told so as well.
                self.fail(claim, "Refused", error.details())
        except grpc.RpcError as error:
            print(f"python worker: {task.task_id}: {error.details()}", file=sys.stderr)
        finally:
            self.held.pop(task.claim_token, None)

    def fail(self, claim, name, message, trace=None):
        """Records a failure. The server cleans the reason and keeps 64 KiB of it."""
        reason = {"name": name, "message": message[:10_000], "traceback": trace and trace[-10_000:]}
        request = settle_pb2.FailTaskRequest(reason=json_pb2.Json(text=json.dumps(reason)), **claim)
        self.call(self.stub.FailTask, request)
        print(f"python worker: failed: {name}: {message[:200]}", file=sys.stderr)

    def call(self, method, request):
        """Makes a call about a claim, and repeats it while the server is away and the claim is held."""
        pause = 0.1
        while True:
            try:
                return method(request, timeout=10)
            except grpc.RpcError as error:
                if error.code() not in PASSING or time.monotonic() + pause > self.held.get(request.claim_token, 0):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def stop(self):
        """Drains: the stream ends, and the tasks in flight stay with this worker."""
        self.stopping.set()
        try:
            self.stub.DrainWorker(claim_pb2.DrainWorkerRequest(queue=QUEUE, session_id=self.session_id), timeout=5)
            time.sleep(5)
        except grpc.RpcError as error:
            print(f"python worker: cannot drain: {error.details()}", file=sys.stderr)
        # The stream has ended by now, or the server is away.
        if self.stream is not None:
            self.stream.cancel()


def main():
    with grpc.insecure_channel(URL, options=PINGS) as channel:
        worker = Worker(absurd_service_pb2_grpc.AbsurdServiceStub(channel))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=worker.stop, daemon=True).start())
        threading.Thread(target=worker.keep, daemon=True).start()
        worker.run()


if __name__ == "__main__":
    main()
