// One runner of a relay, on the original TypeScript SDK: its task is carried on by workers of several languages in turn.
// HOLD names the step that it stays in until it is killed.
import pg from "pg";
import { Absurd } from "absurd-sdk";

const app = new Absurd({ db: new pg.Pool({ max: 3 }), queueName: "q" });
app.registerTask({ name: "relay" }, async (params, ctx) => {
  const leg = (number) =>
    ctx.step("same", async () => {
      console.log(`step ${number}`);
      if (process.env.HOLD === String(number)) await new Promise((done) => setTimeout(done, 3_600_000));
      return { n: number, by: "typescript" };
    });
  const legs = [await leg(1), await leg(2)];
  const half = await ctx.beginStep("half");
  const state = half.done ? half.state : await ctx.completeStep(half, [null, 1.5, "ü"]);
  await ctx.sleepFor("nap", 1);
  legs.push(await leg(3));
  const event = await ctx.awaitEvent(`go:${ctx.taskID}`);
  const child = await ctx.awaitTaskResult(params.child, { queue: "children" });
  legs.push(await leg(4));
  return { legs, half: state, event, child: child.result };
});
await app.startWorker({ claimTimeout: 2, pollInterval: 0.05, fatalOnLeaseTimeout: false });
console.log("ready");
