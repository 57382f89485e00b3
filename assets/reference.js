// The reference: renders /openapi.json.

import { byId, copy, curl, el, pretty } from "./common.js";

const MAX_DEPTH = 4;
let schemas = {};

/** Follows a reference. A description beside it takes precedence over the target's. */
function resolve(schema = {}) {
  if (!schema.$ref) return schema;
  const target = resolve(schemas[schema.$ref.split("/").at(-1)]);
  return schema.description ? { ...target, description: schema.description } : target;
}

/** The nodes of a text: the parts in backticks become `<code>` elements. */
const rich = (text = "") => text.replaceAll("\n", " ").split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));

const plain = (text) => text.replaceAll("`", "");

/** The names of a schema's types. A union has several, and an enumeration has its values. */
function typeNames(given) {
  const schema = resolve(given);
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return [...new Set(options.flatMap(typeNames))];
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value));
  return [schema.type].flat().map((type) => {
    if (type === "array") return typeNames(schema.items).length > 1 ? `(${typeName(schema.items)})[]` : `${typeName(schema.items)}[]`;
    if (type !== "integer" || !(schema.minimum > 0 || schema.maximum != null)) return type ?? "any";
    return schema.maximum == null ? `integer ≥ ${schema.minimum}` : `integer ${schema.minimum ?? 0}–${schema.maximum}`;
  });
}

/** A type in TypeScript's notation. */
const typeName = (schema) => typeNames(schema).join(" | ");

/** The fields of a schema and of the objects in it: [{name, types, isRequired, meaning}]. Required ones come first. */
function fields(given, prefix = "", depth = 0) {
  const schema = resolve(given);
  if (schema.type === "array") return fields(schema.items, `${prefix}[]`, depth);
  const required = schema.required ?? [];
  const properties = schema.properties ?? {};
  const names = new Set([...required, ...Object.keys(properties)].filter((name) => name in properties));
  return [...names].flatMap((key) => {
    const property = properties[key];
    const name = prefix ? `${prefix}.${key}` : key;
    const row = { name, types: typeNames(property), isRequired: required.includes(key), meaning: resolve(property).description };
    return [row, ...(depth < MAX_DEPTH ? fields(property, name, depth + 1) : [])];
  });
}

/** A table of fields. For a request it marks the required fields and leaves out the type `null` of the optional ones. */
function fieldTable(schema, caption, isRequest) {
  const row = ({ name, types, isRequired, meaning }) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("code", {}, name), isRequest && isRequired ? el("span", { class: "required" }, " required") : ""),
      el("td", { class: "type" }, types.filter((type) => !(isRequest && !isRequired && type === "null")).join(" | ")),
      el("td", {}, ...rich(meaning)),
    );
  return table(caption, ["Field", "Type", "Meaning"], fields(schema).map(row));
}

const table = (caption, heads, rows) =>
  el(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("caption", { class: "visually-hidden" }, caption), el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...rows)),
  );

/** The variants of a body: the members of its `oneOf`, or the body itself. */
const variants = (schema) => resolve(schema).oneOf ?? [schema];

/** The required fields that distinguish a variant of a request from the others: "`documents` and `property`". */
function variantName(variant, all) {
  const required = (schema) => resolve(schema).required ?? [];
  const own = required(variant).filter((name) => !all.every((other) => required(other).includes(name)));
  return own.map((name) => `\`${name}\``).join(" and ");
}

const json = (part) => part?.content?.["application/json"]?.schema;

function operation(method, path, details, needsKey) {
  const id = `${method}${path.replace(/[^\w]+/g, "-")}`;
  const isSecured = Boolean(details.security);
  const title = `${method.toUpperCase()} ${path}`;
  const parts = [
    el("h2", { id: `${id}-title` }, el("span", { class: "method" }, method.toUpperCase()), " ", path),
    el("p", {}, ...rich(details.summary), ...(details.description ? [" ", ...rich(details.description)] : [])),
    el("p", { class: "hint" }, isSecured ? "Needs a key if the server has keys." : "Needs no key."),
  ];
  for (const parameter of details.parameters ?? []) {
    parts.push(el("p", {}, el("code", {}, parameter.name), ` in the ${parameter.in}: `, ...rich(parameter.description)));
  }

  const request = json(details.requestBody);
  const bodies = request ? variants(request) : [];
  for (const body of bodies) {
    const name = bodies.length > 1 ? `Request with ${variantName(body, bodies)}` : "Request";
    const { description = "", example } = resolve(body);
    parts.push(el("h3", {}, ...rich(name)), el("p", {}, ...rich(description)), fieldTable(body, `${title}: ${plain(name)}`, true));
    if (example) parts.push(snippet(`${title}: ${plain(name)}`, curl(new URL(path.slice(1), location.href).href, example, needsKey && isSecured)));
  }
  if (method === "get" && !path.includes("{")) {
    const key = needsKey && isSecured ? ' -H "Authorization: Bearer $RERANKD_API_KEY"' : "";
    parts.push(snippet(title, `curl ${new URL(path.slice(1), location.href).href}${key}`));
  }

  const answers = json(details.responses["200"]);
  for (const [i, answer] of (answers ? variants(answers) : []).entries()) {
    const name = bodies.length > 1 ? `Response to ${variantName(bodies[i] ?? bodies[0], bodies)}` : "Response";
    parts.push(el("details", {}, el("summary", {}, ...rich(name)), fieldTable(answer, `${title}: ${plain(name)}`, false)));
  }
  const statuses = Object.entries(details.responses).map(([status, { description }]) =>
    el("tr", {}, el("th", { scope: "row" }, el("code", {}, status)), el("td", {}, ...rich(description || STATUS[status]))),
  );
  parts.push(el("details", {}, el("summary", {}, "Statuses"), table(`${title}: statuses`, ["Status", "When"], statuses)));
  return { id, title, method, path, node: el("section", { id, "aria-labelledby": `${id}-title` }, ...parts) };
}

/** For responses without a description. */
const STATUS = { 200: "The answer", 401: "No key, or a wrong one", 404: "There is no such model" };

function snippet(name, code) {
  const button = el("button", { type: "button", click: () => copy(code, button) }, "Copy");
  return el("div", { class: "snippet" }, button, el("pre", { tabindex: "0", role: "region", "aria-label": `Example of ${name}` }, code));
}

async function render() {
  const [contract, auth] = await Promise.all(["openapi.json", "v1/cluster/auth"].map((path) => fetch(path).then((response) => response.json())));
  schemas = contract.components.schemas;
  byId("about").append(` Version ${contract.info.version}.`);

  const isOps = (details) => (details.tags ?? []).includes("ops");
  const all = Object.entries(contract.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, details]) => ({ path, method, details })));
  // First /v1/rerank, then the other paths for ranking, then those with the tag `ops`; within each, in the order of openapi.json.
  all.sort((a, b) => isOps(a.details) - isOps(b.details) || (b.path === "/v1/rerank") - (a.path === "/v1/rerank"));
  const operations = all.map(({ path, method, details }) => operation(method, path, details, auth.auth));
  const errors = el(
    "section",
    { id: "errors", "aria-labelledby": "errors-title" },
    el("h2", { id: "errors-title" }, "Errors"),
    el("p", {}, ...rich("The body of every error. For clients of text-embeddings-inference and Weaviate, `error` is a text, and there is `error_type`.")),
    fieldTable(schemas.ErrorBody, "Error body", false),
  );
  byId("operations").replaceChildren(...operations.map(({ node }) => node), errors);
  const link = (id, ...text) => el("li", {}, el("a", { href: `#${id}` }, ...text));
  byId("contents").replaceChildren(
    el("ul", {}, ...operations.map(({ id, method, path }) => link(id, el("span", { class: "method" }, method.toUpperCase()), " ", path)), link("errors", "Errors")),
  );
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

render().catch((error) => {
  byId("operations").replaceChildren(el("p", { class: "problem", role: "alert" }, el("strong", {}, "The reference could not be loaded."), String(error)));
});
