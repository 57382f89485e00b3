// Errors that the server sends while a large body is still being sent: the same test as ../python/early_errors.py, in JavaScript.

import http from "node:http";
import { Readable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";

const BODY_BYTES = 32 << 20;
const CHUNK_BYTES = 256 << 10;
const REPETITIONS = 2;
const KEY = process.env.RERANKD_KEY;

// Column of the table -> server, path, key, status, part of the message, whether there is a Retry-After.
// The servers are those of servers.py: CLOSED has a key, FULL has no memory left for bodies, CAPPED no connection left.
const CASES = {
  401: ["CLOSED", "/v1/rerank", "a-wrong-key", 401, "Invalid token", false],
  404: ["CLOSED", "/no/such/path", KEY, 404, "does not exist", false],
  413: ["CLOSED", "/v1/rerank", KEY, 413, "more than", false],
  "503 memory": ["FULL", "/v1/rerank", KEY, 503, "overloaded", true],
  "503 connections": ["CAPPED", "/v1/rerank", KEY, 503, "overloaded", true],
};

const buffered = () => Buffer.alloc(BODY_BYTES, " ");

async function* streamed() {
  for (let sent = 0; sent < BODY_BYTES; sent += CHUNK_BYTES) {
    await sleep(1); // so that the error is sent before the last chunk
    yield Buffer.alloc(CHUNK_BYTES, " ");
  }
}

async function withFetch(url, headers, body) {
  const isStream = !Buffer.isBuffer(body);
  const answer = await fetch(url, {
    method: "POST",
    headers,
    body: isStream ? Readable.toWeb(Readable.from(body)) : body,
    ...(isStream && { duplex: "half" }),
  });
  return [answer.status, answer.headers.get("retry-after"), await answer.json()];
}

/** node:http, on which axios, got and node-fetch are built. */
function withNodeHttp(url, headers, body) {
  return new Promise((resolve, reject) => {
    const request = http.request(url, { method: "POST", headers, agent: false });
    request.on("error", reject);
    request.on("response", async (answer) => {
      try {
        const text = Buffer.concat(await answer.toArray()).toString();
        resolve([answer.statusCode, answer.headers["retry-after"] ?? null, JSON.parse(text)]);
      } catch (error) {
        reject(error);
      }
    });
    if (Buffer.isBuffer(body)) request.end(body);
    else Readable.from(body).on("error", reject).pipe(request);
  });
}

async function runCase(post, makeBody, [server, path, key, status, message, hasRetryAfter]) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  for (let i = 0; i < REPETITIONS; i++) {
    const [got, retryAfter, json] = await post(process.env[`RERANKD_${server}`] + path, headers, makeBody());
    if (got !== status) throw new Error(`status ${got}, expected ${status}`);
    if (!json.message.includes(message)) throw new Error(`message ${json.message}`);
    if ((retryAfter !== null) !== hasRetryAfter) throw new Error(`Retry-After ${retryAfter}`);
  }
}

for (const [client, post] of [
  ["fetch", withFetch],
  ["node:http", withNodeHttp],
]) {
  for (const makeBody of [buffered, streamed]) {
    const cells = {};
    for (const [column, example] of Object.entries(CASES)) {
      try {
        await runCase(post, makeBody, example);
        cells[column] = { state: "ok", note: "" };
      } catch (error) {
        cells[column] = { state: "FAIL", note: `${error.name}: ${error.message} ${error.cause ?? ""}` };
      }
    }
    console.log(JSON.stringify({ client: `${client}, ${makeBody.name}`, version: `Node ${process.versions.node}`, cells }));
  }
}
process.exit();
