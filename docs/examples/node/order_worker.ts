// An order in TypeScript: a step, a wait for an event, and the end, on a client made from proto/ by @grpc/proto-loader.
//
//     cd docs/examples/node && npm ci && npm run build && npm start [-- ORDERS]
//
// Without ORDERS it works for ever. The parcel of each order contains the text of the file that GREETING names. An order
// with the field `replaces` cancels the task that it names.

import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import protobuf from "protobufjs";
import type { AbsurdServiceClient } from "./generated/absurd/v1/AbsurdService.js";
import type { AwaitEventResponse__Output } from "./generated/absurd/v1/AwaitEventResponse.js";
import type { Checkpoint__Output } from "./generated/absurd/v1/Checkpoint.js";
import type { ClaimedTask__Output } from "./generated/absurd/v1/ClaimedTask.js";
import type { ClaimStreamResponse__Output } from "./generated/absurd/v1/ClaimStreamResponse.js";
import type { GetAllCheckpointsResponse__Output } from "./generated/absurd/v1/GetAllCheckpointsResponse.js";
import type { ProtoGrpcType } from "./generated/absurd_service.js";

const url = (process.env.ABSURD_URL ?? "http://127.0.0.1:50051").replace("http://", "");
const queue = process.env.ABSURD_DEFAULT_QUEUE ?? "default";
const lease = 60;

const proto = fileURLToPath(new URL("../../../../proto", import.meta.url));
const definition = loadSync("absurd/v1/absurd_service.proto", {
  includeDirs: [proto], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
});
const { absurd: packages } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;
// Without pings a dead connection is never noticed.
const pings = { "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 5_000 };
const absurd = new packages.v1.AbsurdService(url, grpc.credentials.createInsecure(), pings);

type Method<Q, R> = (request: Q, options: grpc.CallOptions, done: grpc.requestCallback<R>) => unknown;

/** A unary call as a promise. */
function unary<Q, R>(method: Method<Q, R>, request: Q, seconds = 10): Promise<R> {
  const deadline = Date.now() + 1000 * seconds;
  return new Promise((resolve, reject) =>
    method.call(absurd, request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer as R))));
}

/** The claim is over: report nothing. A handler that catches it must throw it again. */
class ClaimOver extends Error {}

/** The run sleeps. */
class Suspended extends ClaimOver {}

/** The server refused a call of this worker. The same call would be refused again. */
class Refused extends Error {
  override name = "Refused";
}

// The parts of google.rpc.Status that hold the reason of an error. gRPC sends it as `grpc-status-details-bin`.
const { root } = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
`, { keepCase: true });

const { status } = grpc;

/** The reason of a gRPC error, such as JSON_INVALID. An error that no server of Absurd's made has its code alone. */
function reasonOf(error: grpc.ServiceError): string {
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const details: any[] = Buffer.isBuffer(bytes) ? (root.lookupType("Status").decode(bytes) as any).details : [];
  const info = details.find((detail) => detail.type_url.endsWith("/google.rpc.ErrorInfo"));
  return info ? (root.lookupType("ErrorInfo").decode(info.value) as any).reason : status[error.code];
}

/** Reasons: the run belongs to this worker no longer. */
const lost = ["CLAIM_LOST", "CLAIM_EXPIRED", "TASK_CANCELLED", "RUN_NOT_RUNNING", "RUN_NOT_FOUND"];
/** Codes: the server is away or busy. A repeated call has one effect. */
const passing = [
  status.UNAVAILABLE, status.RESOURCE_EXHAUSTED, status.DEADLINE_EXCEEDED, status.UNKNOWN, status.CANCELLED,
];

/** One execution of a task: the calls that this worker makes about it. */
class Run {
  private readonly claim;
  private leaseEnd = performance.now() + 1000 * lease;
  private stored?: Map<string, string>;

  constructor(readonly task: ClaimedTask__Output) {
    this.claim = { queue, claim_token: task.claim_token };
  }

  /** Makes a call, and repeats it until the server answers or the lease ends. */
  private async call<R>(method: Method<any, R>, request: object): Promise<R> {
    for (let pause = 100; ; pause = Math.min(2 * pause, 5000)) {
      const left = this.leaseEnd - performance.now();
      try {
        return await unary(method, request, Math.min(10, Math.max(left / 1000, 1)));
      } catch (thrown) {
        const error = thrown as grpc.ServiceError;
        const reason = reasonOf(error);
        const message = `${reason}: ${error.details}`;
        const passes = passing.includes(error.code);
        if (lost.includes(reason) || (passes && left < pause)) throw new ClaimOver(message);
        if (!passes) throw new Refused(message);
        console.error(`${message}; trying again`);
      }
      await sleep(pause);
    }
  }

  /** The values of the steps that earlier executions stored, by name. */
  private async checkpoints(): Promise<Map<string, string>> {
    const { run_id, checkpoints_complete } = this.task;
    const stored: Checkpoint__Output[] = checkpoints_complete ? this.task.checkpoints : [];
    for (let page_token = "", more = !checkpoints_complete; more; more = page_token !== "") {
      const request = { queue, run_id, page_token };
      const page = await this.call<GetAllCheckpointsResponse__Output>(absurd.GetAllCheckpoints, request);
      stored.push(...page.checkpoints);
      page_token = page.next_page_token;
    }
    return new Map(stored.map(({ checkpoint_name, state }) => [checkpoint_name, state?.text ?? "null"]));
  }

  /** Returns the stored value of the step. The first time, calls the action and stores its value. */
  async step<T>(name: string, action: () => T | Promise<T>): Promise<T> {
    this.stored ??= await this.checkpoints();
    let text = this.stored.get(name);
    if (text === undefined) {
      text = json(await action());
      const begun = performance.now();
      await this.call(absurd.SetCheckpoint, {
        ...this.claim, checkpoint_name: name, state: { text }, extend_by: { seconds: lease },
      });
      this.leaseEnd = begun + 1000 * lease;
      this.stored.set(name, text);
    }
    return JSON.parse(text);
  }

  /** Returns the payload of the event. While there is none, the run sleeps and this execution ends. */
  async awaitEvent(name: string, event: string): Promise<any> {
    const answer = await this.call<AwaitEventResponse__Output>(absurd.AwaitEvent, {
      ...this.claim, step_name: name, event_name: event, timeout: { seconds: 86400 },
    });
    if (answer.outcome === "payload") return JSON.parse(answer.payload!.text);
    if (answer.outcome === "suspended") throw new Suspended();
    throw new Error(`${event}: ${answer.outcome}`);
  }

  async complete(value: unknown): Promise<void> {
    await this.call(absurd.CompleteTask, { ...this.claim, result: { text: json(value) } });
  }

  /** Records a failure. The server cleans the reason and keeps 64 KiB of it. */
  async fail(thrown: unknown): Promise<void> {
    const { name, message, stack } = thrown instanceof Error ? thrown : new Error(String(thrown));
    const reason = { name, message: message.slice(0, 10_000), traceback: stack?.slice(0, 10_000) };
    await this.call(absurd.FailTask, { ...this.claim, reason: { text: json(reason) } });
  }
}

/** A value as JSON text; undefined is null. */
function json(value: unknown): string {
  return JSON.stringify(value) ?? "null";
}

/** The handler. It runs from its beginning each time; a stored step is not done again. */
async function fulfil(run: Run): Promise<object> {
  const order = JSON.parse(run.task.params!.text);
  const payment = await run.step("charge", () => {
    console.log(`charged ${order.order_id}`);
    return { payment: `pay-${order.order_id}` };
  });
  if (order.replaces !== undefined) {
    // A call of the handler's own. Its errors are failures of the task, as those of any other service are.
    await unary<any, unknown>(absurd.CancelTask, { queue, task_id: order.replaces });
  }
  const shipment = await run.awaitEvent("await-shipment", `shipment.packed:${order.order_id}`);
  if (process.env.GREETING) shipment.greeting = readFileSync(process.env.GREETING, "utf8");
  return { ...payment, ...shipment, by: "typescript" };
}

/** The tokens of the runs in flight. A new stream names them, so that they count against its credit. */
const held = new Set<string>();

/** Runs one task and reports how it went; says whether it is completed. */
async function carryOut(run: Run): Promise<boolean> {
  const { task_id, claim_token } = run.task;
  held.add(claim_token);
  try {
    try {
      await run.complete(await fulfil(run));
      console.log(`completed ${task_id}`);
      return true;
    } catch (error) {
      if (error instanceof ClaimOver) throw error;
      // The handler failed, or the server refused a value that the handler made. Either way the attempt ends here.
      await run.fail(error);
      console.error(`failed ${task_id}: ${error}`);
    }
  } catch (error) {
    if (error instanceof Suspended) console.log(`suspended ${task_id}`);
    else console.error(`${task_id}: ${error}`);
  } finally {
    held.delete(claim_token);
  }
  return false;
}

/** Holds one stream to its end; `onTask` ends it by returning true. */
function work(client: AbsurdServiceClient, onTask: (task: ClaimedTask__Output) => Promise<boolean>): Promise<void> {
  const stream = client.ClaimStream({
    queue, worker_id: `node:${process.pid}`, session_id: session, claim_timeout: { seconds: lease },
    held_claim_tokens: [...held],
  });
  return new Promise((resolve) => {
    stream.on("data", (response: ClaimStreamResponse__Output) => {
      if (response.message === "opened") console.log("ready");
      if (response.message === "task") onTask(response.task!).then((over) => over && stream.cancel());
    });
    stream.on("error", (error: grpc.ServiceError) => {
      // The worker's own cancel is reported as an error too.
      if (error.code !== status.CANCELLED) console.error(error.message);
    });
    stream.on("close", resolve);
  });
}

const session = randomUUID();
let left = Number(process.argv[2] ?? Infinity);
while (left > 0) {
  await work(absurd, async (task) => (await carryOut(new Run(task))) && --left === 0);
  if (left > 0) await sleep(1000);
}
absurd.close();
