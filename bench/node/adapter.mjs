// What the Node adapters share: the commands of the benchmark (see ../README.md), over an object that knows its library:
// setup(), spawners(count) -> async functions of a list of params, worker(settings) -> an async function that starts it.
import fs from "node:fs";

export const URL = process.env.BENCH_DATABASE_URL;
export const TASK = process.env.BENCH_TASK ?? "noop";
const PAD = "x".repeat(70);

const [, , command, text] = process.argv;
const asked = JSON.parse(text);
const counter = asked.counter ? fs.openSync(asked.counter, "r+") : null;
const latencies = [];
const eight = Buffer.alloc(8);
let count = 0;

const say = (line) => fs.writeSync(1, line + "\n");
const end = (result) => { say("result " + JSON.stringify(result)); process.exit(0); };
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const params = (id, t = 0) => ({ id, pad: PAD, t });
const monotonic = () => Number(process.hrtime.bigint());

// To be called by the handler of each task.
export function handled(task) {
  if (task.t) latencies.push((monotonic() - task.t) / 1e6);
  count += 1;
  if (counter !== null) {
    eight.writeBigUInt64LE(BigInt(count));
    fs.writeSync(counter, eight, 0, 8, 0);
  }
  if (count === asked.count) say("handled");
}

function elsewhere() {
  fs.readSync(counter, eight, 0, 8, 0);
  return Number(eight.readBigUInt64LE());
}

async function spawn(peer) {
  const { at_once = 1, batch = 1, ahead = 0 } = asked;
  const callers = await peer.spawners(at_once);
  let next = 0;
  say("ready");
  const started = performance.now();
  const until = asked.seconds === undefined ? Infinity : started + asked.seconds * 1000;
  await Promise.all(callers.map(async (call) => {
    while (performance.now() < until) {
      if (until !== Infinity && next >= elsewhere() + ahead) { await pause(2); continue; }
      if (asked.count !== undefined && next >= asked.count) return;
      const first = next;
      next += batch;
      await call(Array.from({ length: batch }, (_, offset) => params(first + offset)));
    }
  }));
  end({ seconds: (performance.now() - started) / 1000 });
}

async function pace(peer) {
  const [call] = await peer.spawners(1);
  await call([params(0)]);
  say("ready");
  let next = performance.now() + 500;
  for (let index = 0; index < asked.count; index += 1) {
    await pause(Math.max(0, next - performance.now()));
    next += asked.gap_ms;
    await call([params(index, monotonic())]);
  }
  end({});
}

async function work(peer) {
  const starts = [];
  for (let index = 0; index < (asked.workers ?? 1); index += 1) starts.push(await peer.worker(asked.settings ?? {}));
  say("ready");
  process.stdin.once("data", () => end({ latencies }));
  await Promise.all(starts.map((start) => start()));
}

export async function main(peer) {
  if (command === "setup") { await peer.setup(); end({}); }
  await { spawn, feed: spawn, pace, work }[command](peer);
}
