// pg-boss: polls, claims and completes in batches; keeps results.
import * as library from "pg-boss";
import { URL, handled, main } from "./adapter.mjs";

const PgBoss = library.PgBoss ?? library.default;
const NOTIFY = process.env.BENCH_NOTIFY === "1";

async function boss(options) {
  const started = new PgBoss({ connectionString: URL, ...options });
  started.on("error", () => {});
  await started.start();
  return started;
}

await main({
  setup: async () => (await boss({})).createQueue("q", { notify: NOTIFY }),
  async spawners(count) {
    const client = await boss({ max: count, supervise: false, schedule: false });
    return Array(count).fill(async (tasks) => {
      if (tasks.length === 1) await client.send("q", tasks[0]);
      else await client.insert("q", tasks.map((data) => ({ data })));
    });
  },
  async worker(settings) {
    const worker = await boss({ max: 10, useListenNotify: NOTIFY });
    return () => worker.work("q", settings, async (jobs) => { for (const job of jobs) handled(job.data); });
  },
});
