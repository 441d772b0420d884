// The original TypeScript SDK: what its documentation promises, against the database of the PG variables.
// The argument is the storage mode of the queue.
import assert from "node:assert/strict";
import pg from "pg";
import { Absurd, TimeoutError } from "absurd-sdk";

const mode = process.argv[2];
const queueName = `sdk node ${mode}`;
const pool = new pg.Pool({ max: 5 });
const seen = [];
const app = new Absurd({
  db: pool,
  queueName,
  hooks: {
    beforeSpawn: (name, params, options) => ({ ...options, headers: { ...options.headers, trace: `t-${name}` } }),
    wrapTaskExecution: async (ctx, execute) => {
      seen.push(ctx.headers.trace);
      return execute();
    },
  },
});
await app.createQueue(undefined, { storageMode: mode, cleanupTtl: "90 days", cleanupLimit: 77 });
await app.setQueuePolicy(undefined, { cleanupLimit: 78 });
const policy = await app.getQueuePolicy();
assert.equal(policy.storageMode, mode);
assert.equal(policy.cleanupLimit, 78);
assert.ok((await app.listQueues()).includes(queueName));

const calls = [];
app.registerTask({ name: "steps", defaultMaxAttempts: 3 }, async (params, ctx) => {
  const values = [];
  for (const n of [0, 1, 2]) {
    values.push(
      await ctx.step("same", async () => {
        calls.push(n);
        return { n };
      }),
    );
  }
  const handle = await ctx.beginStep("manual");
  if (!handle.done) await ctx.completeStep(handle, [null, "x"]);
  await ctx.heartbeat();
  if (calls.length < 4) {
    calls.push("crash");
    throw new Error("on purpose");
  }
  return { values, params };
});
const steps = await app.spawn("steps", { x: "ü" });
assert.equal(steps.created, true);
await app.workBatch("w", 60, 1);
await app.workBatch("w", 60, 1);
const stepsEnd = await app.fetchTaskResult(steps.taskID);
assert.deepEqual(stepsEnd, { state: "completed", result: { values: [{ n: 0 }, { n: 1 }, { n: 2 }], params: { x: "ü" } } });
assert.deepEqual(calls, [0, 1, 2, "crash"]);
assert.deepEqual(seen, ["t-steps", "t-steps"]);

app.registerTask({ name: "waiter" }, async (params, ctx) => {
  await ctx.sleepFor("nap", 0);
  try {
    return await ctx.awaitEvent(params.event, { timeout: params.timeout });
  } catch (error) {
    if (error instanceof TimeoutError) return "timed out";
    throw error;
  }
});
await app.emitEvent("early", { v: 1 });
await app.emitEvent("early", { v: 2 });
const early = await app.spawn("waiter", { event: "early" });
const late = await app.spawn("waiter", { event: "late" });
const never = await app.spawn("waiter", { event: "never", timeout: 0 });
for (let i = 0; i < 4; i++) await app.workBatch("w", 60, 3);
assert.deepEqual((await app.fetchTaskResult(early.taskID)).result, { v: 1 });
assert.equal((await app.fetchTaskResult(late.taskID)).state, "sleeping");
assert.equal((await app.fetchTaskResult(never.taskID)).result, "timed out");
await app.emitEvent("late", null);
await app.workBatch("w", 60, 3);
assert.deepEqual(await app.fetchTaskResult(late.taskID), { state: "completed", result: null });

app.registerTask({ name: "fails" }, async () => {
  throw new Error("always");
});
const failing = await app.spawn("fails", undefined, { maxAttempts: 1, idempotencyKey: "once" });
assert.equal((await app.spawn("fails", undefined, { idempotencyKey: "once" })).created, false);
await app.workBatch("w", 60, 1);
const failure = await app.fetchTaskResult(failing.taskID);
assert.equal(failure.state, "failed");
assert.equal(failure.failure.message, "always");
const again = await app.retryTask(failing.taskID, { maxAttempts: 2 });
assert.equal(again.attempt, 2);
await app.workBatch("w", 60, 1);
const copy = await app.retryTask(failing.taskID, { spawnNewTask: true });
assert.notEqual(copy.taskID, failing.taskID);
await app.cancelTask(copy.taskID);
assert.equal((await app.fetchTaskResult(copy.taskID)).state, "cancelled");

// Spawned in the application's own transaction: there after the commit, gone after a rollback.
const client = await pool.connect();
await client.query("begin");
const lost = await app.bindToConnection(client).spawn("fails", 1);
await client.query("rollback");
client.release();
assert.equal(await app.fetchTaskResult(lost.taskID), null);

app.registerTask({ name: "double" }, async (params) => params * 2);
const tasks = [];
for (let n = 0; n < 20; n++) tasks.push(await app.spawn("double", n));
const worker = await app.startWorker({ concurrency: 4, pollInterval: 0.02, claimTimeout: 60 });
for (const [n, task] of tasks.entries()) {
  assert.deepEqual(await app.awaitTaskResult(task.taskID, { timeout: 30 }), { state: "completed", result: n * 2 });
}
await worker.close();
await app.dropQueue();
assert.ok(!(await app.listQueues()).includes(queueName));
await pool.end();
console.log("ok");
