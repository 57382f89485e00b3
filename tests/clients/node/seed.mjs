// The example request and the checks for every client: the JavaScript counterpart of python/seed.py.
//
// A client's file defines `rank(server, model, topN, texts)`. It sends the request through the client and returns
// [{index, score, text}] in the client's order. `check` runs it and prints one line of JSON.

import { readFileSync } from "node:fs";
import { Socket } from "node:net";

export const QUERY = "Apple";
export const DOCUMENTS = ["apple", "banana", "fruit", "vegetable"];
const MODEL = "rerankd-mini";
const UNKNOWN_MODEL = "no-such-model";

// The server's error messages, which should reach the user of a client.
const MESSAGES = { "wrong key": "Invalid token", "unknown model": "Model does not exist", overload: "overloaded" };

// As in python/seed.py, where some clients store scores as 32-bit floats. JavaScript's are 64-bit.
const SCORE_TOLERANCE = 1e-5;

const OPEN = { url: process.env.RERANKD_OPEN, key: "any-key-at-all" };
const CLOSED = { url: process.env.RERANKD_CLOSED, key: process.env.RERANKD_KEY };
const WRONG_KEY = { url: CLOSED.url, key: "a-wrong-key" };
const BUSY = { url: process.env.RERANKD_BUSY, key: "any-key-at-all" };

// Fails on any other connection (telemetry, gateways): a correctly configured client needs none.
const connect = Socket.prototype.connect;
Socket.prototype.connect = function (...args) {
  const { host } = [args[0]].flat().find((one) => one && typeof one === "object") ?? {};
  if (host && !["localhost", "127.0.0.1", "::1"].includes(host)) throw new Error(`connection to another host: ${host}`);
  return connect.apply(this, args);
};

/** The server's answer without a client, best first. */
async function askDirectly(server) {
  const body = JSON.stringify({ model: MODEL, query: QUERY, documents: DOCUMENTS });
  const answer = await (await fetch(`${server.url}/v1/rerank`, { method: "POST", body })).json();
  return answer.results.map((result) => ({ index: result.index, score: result.relevance_score }));
}

const EXPECTED = await askDirectly(OPEN);

/**
 * Runs every check of one client. `wrongKey`, `unknownModel`, `overload`: [class, status] of the error that a user of the client
 * would catch. `notOffered`: checks that the client does not support, with the reason.
 */
export async function check(client, packageName, rank, { wrongKey, unknownModel, overload, notOffered = {} }) {
  const checks = {
    success: async () => {
      for (const server of [OPEN, CLOSED]) compare(await rank(server, MODEL, undefined, false), EXPECTED);
    },
    top_n: async () => compare(await rank(OPEN, MODEL, 2, false), EXPECTED.slice(0, 2)),
    return_documents: async () => {
      const results = await rank(OPEN, MODEL, undefined, true);
      compare(results, EXPECTED);
      for (const { index, text } of results) {
        if (text !== DOCUMENTS[index]) throw new Error(`document ${index} came back as ${JSON.stringify(text)}`);
      }
    },
    "wrong key": () => rejects(wrongKey, "wrong key", () => rank(WRONG_KEY, MODEL, undefined, false)),
    "unknown model": () => rejects(unknownModel, "unknown model", () => rank(OPEN, UNKNOWN_MODEL, undefined, false)),
    overload: () => rejects(overload, "overload", () => rank(BUSY, MODEL, undefined, false)),
  };
  const cells = {};
  for (const [name, run] of Object.entries(checks)) {
    try {
      cells[name] = name in notOffered ? { state: "n/a", note: notOffered[name] } : { state: "ok", note: (await run()) ?? "" };
    } catch (error) {
      cells[name] = { state: "FAIL", note: `${error?.constructor?.name}: ${error?.message}` };
    }
  }
  console.log(JSON.stringify({ client, version: `${packageName} ${version(packageName)}`, cells }));
}

function compare(results, expected) {
  const same =
    results.length === expected.length &&
    results.every(({ index, score }, i) => index === expected[i].index && Math.abs(score - expected[i].score) <= SCORE_TOLERANCE);
  if (!same) throw new Error(`got ${JSON.stringify(results)}, expected ${JSON.stringify(expected)}`);
  if (results.some(({ score }) => score < 0 || score > 1)) throw new Error("a score is not in [0, 1]");
}

/**
 * Returns the name of the error that `ask` throws, and whether it contains the server's message. For overload, it makes several
 * attempts, because the busy server accepts a request between two of those that keep it busy.
 */
async function rejects([expectedClass, status], problem, ask) {
  for (let attempt = 0; attempt < (problem === "overload" ? 5 : 1); attempt++) {
    try {
      await ask();
    } catch (error) {
      const seen = error.statusCode ?? error.status;
      // Packages with several copies of a class provide isInstance.
      const expected = expectedClass.isInstance?.(error) ?? error instanceof expectedClass;
      if (!expected || seen !== status) throw error;
      const hasMessage = error.message.includes(MESSAGES[problem]);
      return `${error.constructor.name} ${seen}${hasMessage ? "" : " (without the server's message)"}`;
    }
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
  throw new Error("no error");
}

function version(packageName) {
  return JSON.parse(readFileSync(new URL(`node_modules/${packageName}/package.json`, import.meta.url))).version;
}
