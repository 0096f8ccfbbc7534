// Runs graphile-worker on a database for `make bench BENCH=peers`: adds jobs one by one with 256 calls in flight (add),
// adds 500 jobs per call (bulk), or runs the jobs that exist (run).
//
//     node graphile.mjs add|bulk|run CONNECTION JOBS
//
// Prints the elapsed time and the processor time in microseconds. The settings are those that graphile-worker's
// documentation recommends for the most jobs per second.
import { createRequire } from "node:module";

const require = createRequire(process.env.PEERS_MODULES + "/");
const { Logger, makeWorkerUtils, run } = require("graphile-worker");

const [what, connection, text] = process.argv.slice(2);
// The connection uses a Unix socket, which has no TLS.
const connectionString = connection.replace(/sslmode=\w+/, "sslmode=disable");
const jobs = Number(text);
const preset = {
  worker: {
    connectionString,
    concurrentJobs: 24,
    maxPoolSize: 25,
    localQueue: { size: 500 },
    completeJobBatchDelay: 0,
    failJobBatchDelay: 0,
  },
};

const logger = new Logger(() => () => {});

const utils = await makeWorkerUtils({ preset, logger });
await utils.migrate();

const before = process.cpuUsage();
const since = process.hrtime.bigint();

if (what === "add") {
  let left = jobs;
  const caller = async () => {
    while (left-- > 0) await utils.addJob("bench", {});
  };
  await Promise.all(Array.from({ length: 256 }, caller));
} else if (what === "bulk") {
  for (let left = jobs; left > 0; left -= 500) {
    const specs = Array.from({ length: Math.min(left, 500) }, () => ({ identifier: "bench", payload: {} }));
    await utils.addJobs(specs);
  }
} else {
  let left = jobs;
  let done;
  const all = new Promise((resolve) => (done = resolve));
  const taskList = { bench: () => void (--left === 0 && done()) };
  const runner = await run({ preset, logger, taskList, noHandleSignals: true });
  await all;
  // Completions that were not sent yet are sent before the worker stops.
  await runner.stop();
}

const micros = (process.hrtime.bigint() - since) / 1000n;
const { user, system } = process.cpuUsage(before);
console.log(`${micros} ${user + system}`);
await utils.release();
process.exit(0);
