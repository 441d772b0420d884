"""A worker process of the load, on the client that grpcio-tools generates: sees the stream's messages as they come, asks
each thing once, and writes down what it does and hears, in the form of history.rs."""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import uuid

import grpc
from absurd.v1 import absurd_service_pb2_grpc, checkpoint_pb2, claim_pb2, event_pb2, json_pb2, settle_pb2, time_pb2
from google.protobuf.duration_pb2 import Duration

QUEUE = "chaos"
DEFINITE = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
}


def now():
    return time.time_ns() // 1000


class Over(Exception):
    """The attempt cannot go on."""


class History:
    def __init__(self, path, stubs):
        self.stubs = stubs
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self.next = 0
        self.guard = threading.Lock()

    def write(self, **line):
        os.write(self.file, (json.dumps(line) + "\n").encode())

    def call(self, op, task, ask, **more):
        """Asks, and asks another replica where one could not be reached; each try is a call of its own in the book."""
        first = random.randrange(len(self.stubs))
        for place in range(first, first + 6):
            last = place == first + 5
            try:
                return self.call_once(op, task, lambda: ask(self.stubs[place % len(self.stubs)]), **more)
            except grpc.RpcError as error:
                if last or error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise Over from error
                time.sleep(0.3)

    def call_once(self, op, task, ask, **more):
        with self.guard:
            self.next += 1
            n = self.next
        self.write(k="begin", n=n, t=now(), op=op, task=task.task_id, run=task.run_id, token=task.claim_token, **more)
        try:
            answer = ask()
        except grpc.RpcError as error:
            how = "no" if error.code() in DEFINITE else "info"
            self.write(k="end", n=n, t=now(), how=how, why=f"{error.code().name} {error.details()}")
            raise
        value = text(answer.payload) if op == "await" and answer.WhichOneof("outcome") == "payload" else None
        self.write(k="end", n=n, t=now(), how="ok", value=value)
        return answer


def text(message):
    value = json.loads(message.text) if message.text else ""
    return value if isinstance(value, str) else json.dumps(value)


def body(value):
    return json_pb2.Json(text=json.dumps(value))


class Worker:
    def __init__(self, options):
        self.options = options
        self.values = 0
        self.stop = threading.Event()
        ping = [("grpc.keepalive_time_ms", 10000), ("grpc.keepalive_timeout_ms", 5000),
                ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
        urls = [url.removeprefix("http://") for url in options.urls.split(",")]
        self.channels = [grpc.insecure_channel(url, options=ping) for url in urls]
        self.stubs = [absurd_service_pb2_grpc.AbsurdServiceStub(channel) for channel in self.channels]
        self.history = History(options.history, self.stubs)

    def value(self):
        self.values += 1
        return f"{self.options.name}-{os.getpid()}-{self.values}"

    def carry_out(self, stream, task):
        shape = json.loads(task.params.text)
        woken = [shape["event"], text(task.event_payload)] if task.HasField("event_payload") else None
        self.history.write(
            k="delivered", t=now(), stream=stream, task=task.task_id, run=task.run_id, token=task.claim_token,
            attempt=task.attempt, params=task.params.text,
            steps=[[step.checkpoint_name, text(step.state)] for step in task.checkpoints],
            complete=task.checkpoints_complete, woken=woken,
        )
        try:
            self.attempt(task, shape)
        except Over:
            pass

    def attempt(self, task, shape):
        call = self.history.call
        known = {step.checkpoint_name for step in task.checkpoints}
        of = {"queue": QUEUE, "claim_token": task.claim_token}
        if self.options.stubborn and random.random() < 0.2:
            # Somebody else gets the run; this attempt goes on as if it had not been told.
            claim = settle_pb2.ClaimRef(run_id=task.run_id, claim_token=task.claim_token)
            request = settle_pb2.ReleaseClaimsRequest(queue=QUEUE, claims=[claim])
            call("release", task, lambda stub: stub.ReleaseClaims(request, timeout=20))
        for step in range(shape["steps"]):
            name = f"s{step}"
            if name not in known:
                time.sleep(shape["work"] / 1000)
                value = self.value()
                request = checkpoint_pb2.SetCheckpointRequest(**of, checkpoint_name=name, state=body(value))
                call("step", task, lambda stub: stub.SetCheckpoint(request, timeout=20), name=name, value=value)
            if step == 0 and shape["nap"]:
                nap = Duration()
                nap.FromMilliseconds(shape["nap"])
                request = time_pb2.SleepRequest(**of, step_name="nap", duration=nap)
                if call("sleep", task, lambda stub: stub.Sleep(request, timeout=20), name="nap").WhichOneof("outcome") == "suspended":
                    return
        if task.attempt <= shape["fails"]:
            reason = self.value()
            request = settle_pb2.FailTaskRequest(**of, reason=body({"name": "Planned", "message": reason}))
            call("fail", task, lambda stub: stub.FailTask(request, timeout=20), value=reason)
            return
        if shape["event"]:
            request = event_pb2.AwaitEventRequest(**of, step_name="wait", event_name=shape["event"])
            answer = call("await", task, lambda stub: stub.AwaitEvent(request, timeout=20), name=shape["event"])
            if answer.WhichOneof("outcome") != "payload":
                return
        value = self.value()
        request = settle_pb2.CompleteTaskRequest(**of, result=body(value))
        call("complete", task, lambda stub: stub.CompleteTask(request, timeout=20), value=value)

    def listen(self, number):
        """One stream, to its end."""
        lease, grace = Duration(seconds=self.options.lease), Duration(seconds=5)
        request = claim_pb2.ClaimStreamRequest(
            queue=QUEUE, worker_id=self.options.name, session_id=self.session, max_in_flight=self.options.in_flight,
            claim_timeout=lease, reconnect_grace=grace,
        )
        messages = random.choice(self.stubs).ClaimStream(request)
        try:
            for message in messages:
                kind = message.WhichOneof("message")
                if kind == "task":
                    threading.Thread(target=self.carry_out, args=(number, message.task), daemon=True).start()
                elif kind == "opened":
                    credit = message.opened.max_in_flight
                    self.history.write(k="stream", t=now(), stream=number, what="opened", credit=credit)
                elif kind == "ending":
                    self.history.write(k="stream", t=now(), stream=number, what="ending")
                else:
                    self.history.write(k="stream", t=now(), stream=number, what=kind or "unknown")
                if self.stop.is_set():
                    messages.cancel()
        finally:
            self.history.write(k="stream", t=now(), stream=number, what="closed")

    def run(self):
        self.session = str(uuid.uuid4())
        number = 0
        while not self.stop.is_set():
            number += 1
            try:
                self.listen(number)
            except grpc.RpcError as error:
                print(f"{self.options.name}: {error.code().name} {error.details()}", file=sys.stderr)
            self.stop.wait(0.5)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--urls", required=True)
    parser.add_argument("--history", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--lease", type=int, default=10)
    parser.add_argument("--stubborn", action="store_true")
    worker = Worker(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: (worker.stop.set(), os._exit(0)))
    worker.run()


if __name__ == "__main__":
    main()
