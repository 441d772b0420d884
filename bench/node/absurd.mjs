// Absurd's own SDK for TypeScript.
import { Absurd } from "absurd-sdk";
import pg from "pg";
import { URL, TASK, handled, main } from "./adapter.mjs";

const app = (max) => new Absurd({ db: new pg.Pool({ connectionString: URL, max }), queueName: "q" });

await main({
  setup: () => app(2).createQueue("q"),
  async spawners(count) {
    const client = app(count);
    return Array(count).fill(async (tasks) => { for (const task of tasks) await client.spawn(TASK, task, { queue: "q" }); });
  },
  async worker({ pool = 10, ...settings }) {
    const worker = app(pool);
    worker.registerTask({ name: "noop" }, async (task) => { handled(task); return { ok: true }; });
    worker.registerTask({ name: "steps" }, async (task, ctx) => {
      for (let index = 0; index < 10; index += 1) await ctx.step(`s${index}`, async () => ({ i: index }));
      handled(task);
      return { ok: true };
    });
    return () => worker.startWorker({ fatalOnLeaseTimeout: false, ...settings });
  },
});
