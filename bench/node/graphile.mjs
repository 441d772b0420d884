// graphile-worker: LISTEN/NOTIFY, a local queue, completions in batches; deletes finished tasks.
import { Logger, makeWorkerUtils, run, runMigrations } from "graphile-worker";
import pg from "pg";
import { URL, handled, main } from "./adapter.mjs";

const logger = new Logger(() => () => {});

await main({
  setup: () => runMigrations({ connectionString: URL, logger }),
  async spawners(count) {
    const pgPool = new pg.Pool({ connectionString: URL, max: count });
    const utils = await makeWorkerUtils({ pgPool, logger });
    return Array(count).fill(async (tasks) => {
      if (tasks.length === 1) await utils.addJob("noop", tasks[0]);
      else await utils.addJobs(tasks.map((payload) => ({ identifier: "noop", payload })));
    });
  },
  async worker(settings) {
    const worker = { connectionString: URL, logger, ...settings };
    return () => run({ preset: { worker }, noHandleSignals: true, taskList: { noop: async (task) => handled(task) } });
  },
});
