// The playground: a request from the form, its answer as ranked documents. Nothing is stored; the key stays in its field.

import { byId, copy, curl, el, pretty } from "./common.js";

const MAX_FILE_BYTES = 8 << 20;
const RESULTS_PER_PAGE = 20;
const PROGRESS_AFTER_MS = 300;
/** Characters shown before and after a chunk until the reader asks for the whole document. */
const CONTEXT_CHARS = 1500;
/** Strips with more chunks have no gaps. */
const DENSE_CHUNKS = 60;
/** Longer code is not shown whole, but copied whole. */
const MAX_CODE_CHARS = 50_000;

const EXAMPLE = {
  query: "What should I do if a carbon monoxide alarm sounds at night?",
  documents: [
    "Carbon monoxide is a colorless gas without smell. It forms when wood, gas or charcoal burns with too little air.",
    "The alarm clock in the dormitory is set to half past four when the forecast promises a clear summit.",
    "Smoke detectors are tested on the first Monday of the month. The test sounds three times; please ignore it.",
    "At night the winter room can cool down to minus ten degrees. Bring a warm sleeping bag, and do what you can to keep the door shut.",
    "The guard dog barks at night. If it wakes you, tell the warden.",
  ].join("\n\n"),
  file: "hut-handbook.txt",
};

let files = []; // [{name, text}]: dropped or chosen files, one document each
let models = []; // of GET /v1/models
let answer = null; // {query, results, stats}: the ranking on the page
let shown = RESULTS_PER_PAGE;
let pending = null; // AbortController of the request in flight
let needsKey = false; // the server has asked for a key
let nextLoad = 0; // timer of the next attempt to load the models

const form = byId("form");
const field = (id) => byId(id).value;

// The request

/** The typed documents and the files: [{label, text}]. */
function documents() {
  const typed = typedDocuments().map((text, i) => ({ label: `Document ${i + 1}`, text }));
  return [...typed, ...files.map(({ name, text }) => ({ label: name, text }))];
}

function typedDocuments() {
  const text = field("documents");
  if (text.trimStart().startsWith("[")) {
    try {
      const list = JSON.parse(text).map((item) => item.text ?? item);
      if (list.every((item) => typeof item === "string")) return list;
    } catch {
      // Not a JSON array: documents that begin with a bracket.
    }
  }
  const parts = text.split(field("separator") === "line" ? "\n" : /\n[^\S\n]*\n/);
  return parts.map((part) => part.trim()).filter(Boolean);
}

function requestBody(list) {
  const model = field("model");
  const body = { ...(model && { model }), query: field("query"), documents: list.map(({ text }) => text), return_chunks: "all" };
  const instruction = field("instruction").trim();
  if (takesInstruction() && instruction) body.instruction = instruction;
  return body;
}

const takesInstruction = () => models.some(({ id, takes_instruction }) => id === field("model") && takes_instruction);

/** `fetch` with the key, from the address of this page. */
function call(path, options = {}) {
  const key = field("key").trim();
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  return fetch(path, { ...options, headers: { ...headers, "content-type": "application/json" }, credentials: "omit" });
}

async function rank() {
  if (pending) return cancel();
  const list = documents();
  const isComplete = [
    check("documents", list.length > 0, "Paste at least one document, or add a file."),
    check("query", field("query").trim() !== "", "Type a query."),
  ].every(Boolean);
  if (!isComplete) return;

  pending = new AbortController();
  const { signal } = pending;
  const query = field("query");
  const start = performance.now();
  const progress = setInterval(() => {
    const seconds = Math.floor((performance.now() - start) / 1000);
    if (byId("progress").hidden) say("Ranking. Escape cancels.");
    byId("progress").hidden = false;
    byId("progress-text").textContent = `Ranking ${count(list.length, "document")}${seconds ? `, ${seconds} s` : ""}`;
  }, PROGRESS_AFTER_MS);
  showProblem(null);
  showRunButton();
  try {
    if (!models.length) await loadModels();
    const response = await call("v1/rerank", { method: "POST", body: JSON.stringify(requestBody(list)), signal });
    const json = await response.json().catch(() => null);
    signal.throwIfAborted();
    if (response.ok && Array.isArray(json?.results)) {
      const stats = { ms: performance.now() - start, ...serverStats(response.headers), tokens: json.usage?.total_tokens };
      showAnswer({ query, stats, results: json.results.map((result) => ({ ...result, document: list[result.index] })) });
    } else {
      refused(response, json?.message);
    }
  } catch (error) {
    if (signal.aborted) say("Cancelled.");
    else showProblem({ message: "The server does not answer.", hint: "It may have stopped, or the connection is down.", isRetryable: true });
  } finally {
    clearInterval(progress);
    byId("progress").hidden = true;
    pending = null;
    showRunButton();
  }
}

function cancel() {
  pending?.abort();
}

/** What the response headers say: times in ms, and what was left out. */
function serverStats(headers) {
  const numbers = (header, pattern) =>
    Object.fromEntries([...(headers.get(header) ?? "").matchAll(pattern)].map(([, name, value]) => [name, Number(value)]));
  return { times: numbers("server-timing", /(\w+);dur=([\d.]+)/g), truncated: numbers("x-rerankd-truncated", /(\w+)=(\d+)/g) };
}

function refused(response, message) {
  if (response.status === 401) return askForKey();
  const seconds = response.headers.get("retry-after");
  showProblem({
    title: `Status ${response.status}`,
    message: message ?? "The answer is not that of a rerank server.",
    hint: seconds && `Try again in ${seconds} s.`,
    isRetryable: [408, 429].includes(response.status) || response.status >= 500,
  });
}

/** Shows the key field. Without a key in it this is a question, with one an error. */
function askForKey() {
  needsKey = true;
  byId("key-field").hidden = false;
  const hasKey = field("key").trim() !== "";
  byId("key-error").textContent = hasKey ? "The server refuses this key." : "This server needs a key.";
  byId("key").setAttribute("aria-invalid", hasKey);
  if (hasKey || pending) byId("key").focus();
  showCode();
}

async function loadModels() {
  const response = await call("v1/models").catch(() => null);
  if (response?.status === 401) return askForKey();
  if (!response?.ok) {
    byId("model-hint").textContent = response ? "The server is loading its models ..." : "The server does not answer.";
    clearTimeout(nextLoad);
    nextLoad = setTimeout(loadModels, 2000);
    return;
  }
  models = (await response.json()).data;
  const chosen = field("model");
  byId("model").replaceChildren(...models.map(({ id }) => el("option", {}, id)));
  if (models.some(({ id }) => id === chosen)) byId("model").value = chosen;
  byId("key-error").textContent = "";
  byId("key").removeAttribute("aria-invalid");
  showModel();
}

// The form

function check(id, isValid, message) {
  const error = byId(`${id}-error`);
  error.hidden = isValid;
  error.textContent = isValid ? "" : message;
  byId(id).setAttribute("aria-invalid", !isValid);
  if (!isValid) byId(id).focus();
  return isValid;
}

function showModel() {
  const model = models.find(({ id }) => id === field("model"));
  byId("model-hint").textContent = model ? `Reads ${number(model.max_input_tokens)} tokens at a time.` : "";
  byId("instruction-field").hidden = !takesInstruction();
  showCode();
}

function showRunButton() {
  const total = documents().length;
  byId("run").textContent = pending ? "Cancel" : total ? `Rank ${count(total, "document")}` : "Rank";
}

async function addFiles(list) {
  const problems = [];
  for (const file of list) {
    const problem = file.size > MAX_FILE_BYTES ? "is larger than 8 MB" : await addFile(file);
    if (problem) problems.push(`${file.name} ${problem}.`);
  }
  byId("files-error").textContent = problems.join(" ");
  formChanged();
}

/** Adds a file, or returns what is wrong with it. */
async function addFile(file) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    return "is not UTF-8 text";
  }
  if (text.includes("\0")) return "is not text";
  if (!text.trim()) return "is empty";
  files.push({ name: file.name, text });
}

function showFiles() {
  const item = (file) => {
    const remove = () => {
      files = files.filter((other) => other !== file);
      formChanged();
      byId("documents").focus();
    };
    return el(
      "li",
      {},
      el("span", {}, file.name),
      el("span", { class: "hint" }, `${number(file.text.length)} characters`),
      el("button", { type: "button", "aria-label": `Remove ${file.name}`, click: remove }, "×"),
    );
  };
  byId("files").replaceChildren(...files.map(item));
  // With files and no typed text, the button below stays in view.
  const box = byId("documents");
  box.classList.toggle("short", files.length > 0 && !box.value);
}

function formChanged() {
  showFiles();
  showRunButton();
  showCode();
  if (answer) showTitle(true);
  else showPreview();
}

async function loadExample() {
  byId("query").value = EXAMPLE.query;
  byId("documents").value = EXAMPLE.documents;
  byId("separator").value = "blank";
  const response = await fetch("assets/example.txt").catch(() => null);
  files = response?.ok ? [{ name: EXAMPLE.file, text: await response.text() }] : [];
  formChanged();
}

function clear() {
  for (const id of ["query", "documents", "instruction"]) byId(id).value = "";
  files = [];
  answer = null;
  byId("stats").replaceChildren();
  byId("files-error").textContent = "";
  showProblem(null);
  formChanged();
  byId("query").focus();
}

// Results

const number = (value) => value.toLocaleString("en");
const count = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
const milliseconds = (ms) => (ms < 0.05 ? "0 ms" : ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10_000 ? `${number(Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`);
const score = (value) => (value !== 0 && Math.abs(value) < 0.0005 ? value.toExponential(0) : value.toFixed(3));
const unit = (value) => Math.min(Math.max(value, 0), 1);
const say = (text) => (byId("status").textContent = text);

/** Shows an error, or none. */
function showProblem(problem) {
  if (!problem) return byId("problem").replaceChildren();
  const { title, message, hint, isRetryable } = problem;
  const box = el("div", { class: "problem" }, el("strong", {}, title ?? message), title && el("p", {}, message), hint && el("p", { class: "hint" }, hint));
  if (isRetryable) box.append(el("button", { type: "button", click: rank }, "Try again"));
  byId("problem").replaceChildren(box);
}

function showTitle(isStale) {
  const { results } = answer;
  const stale = isStale ? el("span", { class: "stale" }, " · the form has changed since") : null;
  byId("results-title").replaceChildren(`${count(results.length, "document")}, best first`, ...(stale ? [stale] : []));
}

/** The documents in the order of the form, before they are ranked. */
function showPreview() {
  const list = documents();
  byId("results-title").textContent = list.length ? `${count(list.length, "document")}, not ranked yet` : "Documents";
  shown = RESULTS_PER_PAGE;
  showList(list.map((document, index) => ({ document, index })));
  if (list.length) return;
  byId("list").append(
    el(
      "li",
      { class: "empty" },
      el("p", {}, "Paste documents into the form, or drop text files anywhere on this page."),
      el("button", { type: "button", click: loadExample }, "Load the example"),
    ),
  );
}

function showAnswer(next) {
  answer = next;
  shown = RESULTS_PER_PAGE;
  const show = () => {
    showTitle(false);
    showStats(answer.stats);
    showList(answer.results);
  };
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (document.startViewTransition && !isStill) document.startViewTransition(show);
  else show();
  const [best] = answer.results;
  say(`${count(answer.results.length, "document")} ranked in ${milliseconds(answer.stats.ms)}.` + (best ? ` Best: ${best.document.label}, score ${score(best.relevance_score)}.` : ""));
  // On a phone the results are below the form.
  if (byId("results").getBoundingClientRect().top > innerHeight * 0.8) byId("results").scrollIntoView();
}

function showStats({ ms, times, truncated, tokens }) {
  const chunks = answer.results.reduce((sum, result) => sum + (result.chunks?.length ?? 0), 0);
  const left = [
    truncated.query && "the query",
    truncated.documents && count(truncated.documents, "document"),
    truncated.chunks && `${count(truncated.chunks, "chunk")} not scored`,
  ].filter(Boolean);
  const rows = [
    ["Total", milliseconds(ms)],
    ...Object.entries(times).map(([name, time]) => [name[0].toUpperCase() + name.slice(1), milliseconds(time)]),
    ["Tokens", tokens != null && number(tokens)],
    ["Chunks", chunks > 0 && number(chunks)],
    ["Truncated", left.join(", ") || "nothing", left.length > 0],
  ];
  byId("stats").replaceChildren(
    ...rows.filter(([, value]) => value).map(([name, value, warn]) => el("div", {}, el("dt", {}, name), el("dd", { class: warn && "warn" }, value))),
  );
}

function showList(results) {
  byId("list").replaceChildren(...results.slice(0, shown).map(entry));
  settle();
  const rest = results.length - shown;
  byId("more").hidden = rest <= 0;
  byId("more").textContent = `Show ${number(Math.min(rest, 50))} more`;
  byId("more").onclick = () => {
    const first = shown;
    shown += 50;
    showList(results);
    byId("list").children[first].querySelector("button, [tabindex='0']")?.focus();
  };
}

/** One document. Without a score it is not ranked yet. */
function entry({ document: { label, text }, index, relevance_score, chunk, chunks }, position) {
  const isRanked = relevance_score != null;
  const bar = isRanked ? el("div", { class: "bar" }, el("i")) : null;
  bar?.firstChild.style.setProperty("--score", unit(relevance_score));
  const isLong = isRanked && (chunks?.length > 1 || (chunk && text.length > 1200));
  const node = el(
    "li",
    { class: !isRanked ? "unranked" : position === 0 && "first" },
    el("span", { class: "rank", "aria-hidden": true }, isRanked ? `${position + 1}` : ""),
    el(
      "div",
      { class: "entry" },
      el(
        "div",
        { class: "entry-head" },
        el("h3", { class: "name" }, label),
        el("span", { class: "score" }, ...(isRanked ? [el("span", { class: "visually-hidden" }, "score "), score(relevance_score)] : [])),
      ),
      bar,
      ...(isLong ? passages({ label, text, chunk, chunks }) : shortText(text)),
    ),
  );
  if (position < 10) node.style.viewTransitionName = `document-${index}`;
  return node;
}

function shortText(text) {
  // The clamp hides all but a few lines, so a preview needs no more.
  const paragraph = el("p", { class: "text short" }, text.slice(0, 1000));
  const toggle = () => {
    const isShort = paragraph.classList.toggle("short");
    paragraph.textContent = isShort ? text.slice(0, 1000) : text;
    button.textContent = isShort ? "Show all" : "Show less";
    button.setAttribute("aria-expanded", !isShort);
  };
  const button = el("button", { type: "button", class: "link", "aria-expanded": "false", click: toggle, hidden: true }, "Show all");
  return [paragraph, button];
}

/** After the entries are on the page: shows the buttons of clamped texts, and scrolls panes to their passage. */
function settle() {
  for (const paragraph of byId("list").querySelectorAll(".text.short")) {
    paragraph.nextSibling.hidden = paragraph.scrollHeight <= paragraph.clientHeight + 1;
  }
  for (const pane of byId("list").querySelectorAll(".pane")) pane.toPassage();
}

/** A long document: its chunks as a strip, and the chosen chunk in its context. */
function passages({ label, text, chunk, chunks: given }) {
  const utf16 = offsets(text);
  const chunks = (given ?? [chunk]).map((one) => ({ ...one, from: utf16(one.start), to: utf16(one.end) }));
  const best = Math.max(chunks.findIndex((one) => one.start === chunk?.start && one.end === chunk?.end), 0);
  let chosen = best;
  let isWhole = false;

  const detail = el("p", { class: "detail" });
  const pane = el("div", { class: "pane text", tabindex: "0", role: "region", "aria-label": `Text of ${label}` });
  const frame = el("div", { class: "frame" }, pane);
  const toggle = el("button", { type: "button", class: "link", "aria-expanded": "false", click: () => ((isWhole = !isWhole), show()) });
  const strip = chunks.length > 1 ? chunkStrip(label, text, chunks, best, (index) => ((chosen = index), show())) : null;

  function show() {
    const { from, to, relevance_score } = chunks[chosen];
    strip?.choose(chosen);
    const place = chunks.length > 1 ? `Chunk ${chosen + 1} of ${chunks.length}` : "The chunk that was scored";
    detail.replaceChildren(
      el("b", {}, place),
      el("span", {}, `score ${score(relevance_score)}${chunks.length > 1 && chosen === best ? ", the best" : ""}`),
      el("span", {}, `characters ${number(chunks[chosen].start)} to ${number(chunks[chosen].end)}`),
    );
    const first = isWhole ? 0 : Math.max(from - CONTEXT_CHARS, 0);
    const last = isWhole ? text.length : Math.min(to + CONTEXT_CHARS, text.length);
    const passage = densest(text, from, to, answer.query);
    const anchor = el("span");
    pane.replaceChildren(
      first > 0 ? "… " : "",
      text.slice(first, from),
      el("mark", {}, text.slice(from, passage), anchor, text.slice(passage, to)),
      text.slice(to, last),
      last < text.length ? " …" : "",
    );
    frame.classList.toggle("whole", isWhole);
    pane.toPassage = () => (pane.scrollTop = anchor.offsetTop - pane.clientHeight / 4);
    pane.toPassage();
    toggle.textContent = isWhole ? "Show less" : "Show the whole document";
    toggle.setAttribute("aria-expanded", isWhole);
  }
  show();
  return [strip, detail, frame, toggle].filter(Boolean);
}

/** A listbox with one option per chunk, as wide as its part of the document. Arrow keys choose. */
function chunkStrip(label, text, chunks, best, onChoose) {
  const options = chunks.map(({ relevance_score, from, to }, index) => {
    const end = chunks[index + 1]?.from ?? to;
    const name = `Chunk ${index + 1} of ${chunks.length}, score ${score(relevance_score)}${index === best ? ", the best" : ""}`;
    const option = el("div", { role: "option", "aria-label": name, title: name, click: () => (onChoose(index), option.focus()) });
    option.style.flexGrow = Math.max(end - from, 1);
    option.style.setProperty("--heat", unit(relevance_score));
    return option;
  });
  const move = (event) => {
    const now = options.indexOf(event.target);
    const last = options.length - 1;
    const next = { ArrowLeft: now - 1, ArrowUp: now - 1, ArrowRight: now + 1, ArrowDown: now + 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const index = Math.min(Math.max(next, 0), last);
    onChoose(index);
    options[index].focus();
  };
  const list = el("div", { class: "chunks", role: "listbox", "aria-label": `Chunks of ${label}`, "aria-orientation": "horizontal", keydown: move }, ...options);
  const strip = el("div", { class: chunks.length > DENSE_CHUNKS ? "strip dense" : "strip" }, list);
  const end = chunks.at(-1).to;
  if (text.slice(end).trim()) {
    const rest = el("span", { class: "unread", title: "The rest was not scored." });
    list.style.flexGrow = end;
    rest.style.flexGrow = text.length - end;
    strip.append(rest);
  }
  strip.choose = (chosen) =>
    options.forEach((option, index) => {
      option.setAttribute("aria-selected", index === chosen);
      option.tabIndex = index === chosen ? 0 : -1;
    });
  return strip;
}

/** A function from code points, which the API counts, to UTF-16 units, which JavaScript counts. */
function offsets(text) {
  if (!/[\ud800-\udbff]/.test(text)) return (at) => Math.min(at, text.length);
  const starts = [];
  let unit = 0;
  for (const character of text) {
    starts.push(unit);
    unit += character.length;
  }
  return (at) => starts[at] ?? text.length;
}

/** The start of the sentence in [from, to) near which most of the query's rare words stand; only for scrolling. */
function densest(text, from, to, query) {
  const words = [...new Set(query.toLowerCase().match(/[\p{L}\p{N}]{3,}/gu))];
  if (!words.length) return from;
  const found = [...text.matchAll(new RegExp(`(?<![\\p{L}\\p{N}])(?:${words.join("|")})`, "giu"))].map((match) => [match.index, match[0].toLowerCase()]);
  const times = Map.groupBy(found, ([, word]) => word);
  let [best, bestWeight] = [from, 0];
  found.forEach(([at], first) => {
    if (at < from || at >= to) return;
    const near = new Set();
    for (let i = first; i < found.length && found[i][0] < Math.min(at + 250, to); i++) near.add(found[i][1]);
    const weight = [...near].reduce((sum, word) => sum + 1 / times.get(word).length, 0);
    if (weight > bestWeight) [best, bestWeight] = [at, weight];
  });
  const before = text.slice(from, best);
  const sentence = Math.max(before.lastIndexOf(". ") + 1, before.lastIndexOf("\n"), before.lastIndexOf("。")) + 1;
  return from + Math.max(sentence, before.length - 200, 0);
}

// Code

function showCode() {
  const code = snippet();
  const rest = code.length - MAX_CODE_CHARS;
  byId("snippet").textContent = rest > 0 ? `${code.slice(0, MAX_CODE_CHARS)}\n… ${number(rest)} more characters are copied` : code;
}

function snippet() {
  const language = document.querySelector("[name=language]:checked").value;
  const url = new URL("v1/rerank", location.href).href;
  const body = requestBody(documents());
  if (language === "curl") return curl(url, body, needsKey);
  const json = pretty(body);
  if (language === "python") {
    const key = needsKey ? `,\n    "Authorization": "Bearer " + os.environ["RERANKD_API_KEY"]` : "";
    return `import json${needsKey ? ", os" : ""}, urllib.request

body = ${json}
headers = {"Content-Type": "application/json"${key}}
request = urllib.request.Request("${url}", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as response:
    for result in json.load(response)["results"]:
        print(result["index"], result["relevance_score"])
`;
  }
  const key = needsKey ? ", Authorization: `Bearer ${process.env.RERANKD_API_KEY}`" : "";
  return `const body = ${json};
const response = await fetch("${url}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(body),
});
const { results, message } = await response.json();
if (!response.ok) throw new Error(message);
for (const { index, relevance_score } of results) console.log(index, relevance_score);
`;
}

// Events

form.addEventListener("submit", (event) => {
  event.preventDefault();
  rank();
});
form.addEventListener("input", (event) => {
  if (event.target.id === "file-input" || event.target.id === "key") return;
  if (event.target.getAttribute("aria-invalid") === "true") check(event.target.id, true);
  formChanged();
});
byId("query").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!pending) rank();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !pending && event.target.id !== "query") rank();
  if (event.key === "Escape") cancel();
});
byId("key").addEventListener("change", loadModels);
byId("model").addEventListener("change", showModel);
byId("file-input").addEventListener("change", async ({ target }) => {
  await addFiles([...target.files]);
  target.value = "";
});
byId("clear").addEventListener("click", clear);
byId("language").addEventListener("change", showCode);
byId("copy").addEventListener("click", ({ target }) => copy(snippet(), target));

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.documentElement.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.documentElement.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.documentElement.classList.remove("dropping");
  addFiles([...event.dataTransfer.files]);
});

loadModels();
loadExample();
