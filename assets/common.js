// What both pages use.

export const byId = (id) => document.getElementById(id);

/** Creates an element. Children that are strings become text, never HTML. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

/** Copies a text and says so on the button. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https or localhost there is no clipboard API.
    const area = el("textarea", { class: "visually-hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.textContent;
  if (label === "Copied") return;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
}

/**
 * A curl command that sends `body` in a here-document. The body needs no escaping: the quoted delimiter turns expansion off, and
 * no line of JSON is `JSON`.
 */
export function curl(url, body, needsKey) {
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $RERANKD_API_KEY"` : "";
  return `curl ${url}${key} \\\n  -H "Content-Type: application/json" \\\n  --data-binary @- <<'JSON'\n${pretty(body)}\nJSON`;
}

export const pretty = (value) => JSON.stringify(value, null, 2);
