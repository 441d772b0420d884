// DBOS Transact: durable workflows, polls; keeps results.
import { DBOS, DBOSClient } from "@dbos-inc/dbos-sdk";
import pg from "pg";
import { URL, TASK, handled, main } from "./adapter.mjs";

const queue = ({ poll }) => ({ onConflict: "always_update", ...(poll ? { minPollingIntervalMs: poll } : {}) });

async function launch(settings) {
  DBOS.setConfig({
    name: "bench", systemDatabaseUrl: URL, applicationVersion: "1", logLevel: "error",
    systemDatabasePoolSize: settings.pool ?? 20,
  });
  DBOS.registerWorkflow(async (task) => { handled(task); return { ok: true }; }, { name: "noop" });
  DBOS.registerWorkflow(async (task) => {
    for (let index = 0; index < 10; index += 1) await DBOS.runStep(async () => ({ i: index }), { name: `s${index}` });
    handled(task);
    return { ok: true };
  }, { name: "steps" });
  await DBOS.launch();
  await DBOS.registerQueue("q", queue(settings));
}

await main({
  setup: () => launch({}),
  async spawners(count) {
    const systemDatabasePool = new pg.Pool({ connectionString: URL, max: Math.max(count, 2) });
    const client = await DBOSClient.create({ systemDatabaseUrl: URL, systemDatabasePool });
    return Array(count).fill(async (tasks) => {
      for (const task of tasks) await client.enqueue({ workflowName: TASK, queueName: "q" }, task);
    });
  },
  async worker(settings) {
    // The dispatch loop begins with the interval that it finds in the database.
    const client = await DBOSClient.create({ systemDatabaseUrl: URL, applicationName: "bench" });
    await client.registerQueue("q", queue(settings));
    await client.destroy();
    return () => launch(settings);
  },
});
