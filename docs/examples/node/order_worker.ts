// An order in TypeScript: a step, a wait for an event, and the end, on a client made from proto/ by @grpc/proto-loader.
//
//     cd docs/examples/node && npm ci && npm run build && npm start [-- ORDERS]
//
// Without ORDERS it works for ever.

import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import type { AbsurdServiceClient } from "./generated/absurd/v1/AbsurdService";
import type { AwaitEventResponse__Output } from "./generated/absurd/v1/AwaitEventResponse";
import type { ClaimedTask__Output } from "./generated/absurd/v1/ClaimedTask";
import type { ClaimStreamResponse__Output } from "./generated/absurd/v1/ClaimStreamResponse";
import type { ProtoGrpcType } from "./generated/absurd_service";

const url = (process.env.ABSURD_URL ?? "http://127.0.0.1:50051").replace("http://", "");
const queue = process.env.ABSURD_DEFAULT_QUEUE ?? "default";
const lease = { seconds: 60 };

const proto = fileURLToPath(new URL("../../../../proto", import.meta.url));
const definition = loadSync("absurd/v1/absurd_service.proto", {
  includeDirs: [proto], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
});
const { absurd: packages } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;
const absurd = new packages.v1.AbsurdService(url, grpc.credentials.createInsecure());

/** A unary call as a promise. */
function call<Q, R>(method: (request: Q, done: grpc.requestCallback<R>) => unknown, request: Q): Promise<R> {
  return new Promise((resolve, reject) =>
    method.call(absurd, request, (error, answer) => (error ? reject(error) : resolve(answer as R))));
}

/** The run sleeps, and the claim is over. */
class Suspended extends Error {}

/** The stored value of the step; the first time, what the action returns. */
async function step<T>(task: ClaimedTask__Output, name: string, action: () => T): Promise<T> {
  const stored = task.checkpoints.find((checkpoint) => checkpoint.checkpoint_name === name);
  if (stored) return JSON.parse(stored.state?.text ?? "null");
  const value = action();
  await call<object, object>(absurd.SetCheckpoint, {
    queue, claim_token: task.claim_token, checkpoint_name: name, state: { text: JSON.stringify(value) }, extend_by: lease,
  });
  return value;
}

/** The payload of the event, when it is there. */
async function awaitEvent(task: ClaimedTask__Output, name: string, event: string): Promise<any> {
  const answer = await call<object, AwaitEventResponse__Output>(absurd.AwaitEvent, {
    queue, claim_token: task.claim_token, step_name: name, event_name: event, timeout: { seconds: 86400 },
  });
  if (answer.outcome === "payload") return JSON.parse(answer.payload!.text);
  if (answer.outcome === "suspended") throw new Suspended();
  throw new Error(`${event}: ${answer.outcome}`);
}

/** The task. It runs from its beginning each time; what is stored is not done again. */
async function fulfil(task: ClaimedTask__Output): Promise<object> {
  const order = JSON.parse(task.params!.text);
  const payment = await step(task, "charge", () => {
    console.log(`charged ${order.order_id}`);
    return { payment: `pay-${order.order_id}` };
  });
  const shipment = await awaitEvent(task, "await-shipment", `shipment.packed:${order.order_id}`);
  return { ...payment, ...shipment, by: "typescript" };
}

/** Runs one task and reports how it went; says whether it has ended. */
async function carryOut(task: ClaimedTask__Output): Promise<boolean> {
  const claim = { queue, claim_token: task.claim_token };
  try {
    const result = { text: JSON.stringify(await fulfil(task)) };
    await call<object, object>(absurd.CompleteTask, { ...claim, result });
    console.log(`completed ${task.task_id}`);
    return true;
  } catch (error) {
    if (error instanceof Suspended) {
      console.log(`suspended ${task.task_id}`);
    } else if (error instanceof Error && "code" in error) {
      // CLAIM_LOST, TASK_CANCELLED and the like: the run is not ours any more. Anything else: the lease ends, and it is
      // tried again.
      console.error(`${task.task_id}: ${error.message}`);
    } else {
      const { name, message } = error as Error;
      await call<object, object>(absurd.FailTask, { ...claim, reason: { text: JSON.stringify({ name, message }) } });
    }
    return false;
  }
}

/** Holds one stream to its end; `onTask` ends it by returning true. */
function work(client: AbsurdServiceClient, onTask: (task: ClaimedTask__Output) => Promise<boolean>): Promise<void> {
  const stream = client.ClaimStream({
    queue, worker_id: `node:${process.pid}`, session_id: session, claim_timeout: lease,
  });
  return new Promise((resolve) => {
    stream.on("data", (response: ClaimStreamResponse__Output) => {
      if (response.message === "opened") console.log("ready");
      if (response.message === "task") onTask(response.task!).then((over) => over && stream.cancel());
    });
    stream.on("error", (error: grpc.ServiceError) => {
      // Our own cancel comes back as an error too, and says nothing new.
      if (error.code !== grpc.status.CANCELLED) console.error(error.message);
    });
    stream.on("close", resolve);
  });
}

const session = randomUUID();
let left = Number(process.argv[2] ?? Infinity);
while (left > 0) {
  await work(absurd, async (task) => (await carryOut(task)) && --left === 0);
  if (left > 0) await new Promise((again) => setTimeout(again, 1000));
}
absurd.close();
