// The TypeScript SDK's worker for durable_figures: each task does as many steps as its params say.
import pg from "pg";
import { Absurd } from "absurd-sdk";

const concurrency = Number(process.env.CONCURRENCY);
const app = new Absurd({ db: new pg.Pool({ max: concurrency + 1 }), queueName: "q" });
app.registerTask({ name: "steps" }, async (params, ctx) => {
  for (let n = 0; n < params.steps; n++) await ctx.step("s", async () => ({ n: 1 }));
  return { done: true };
});
await app.startWorker({ concurrency, pollInterval: 0.05 });
