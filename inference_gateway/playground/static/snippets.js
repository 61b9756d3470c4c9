// A request as a curl command and as Python. The key is never in them: both read SEQR_API_KEY.

import { byId } from "./dom.js";

const VARIABLE = "SEQR_API_KEY";
const base = () => new URL("v1", document.baseURI).href;

export function curl(body) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return [
    `curl --fail-with-body ${base()}/chat/completions \\`,
    `  -H "Authorization: Bearer $${VARIABLE}" \\`,
    '  -H "Content-Type: application/json" \\',
    `  -d '${data}'`,
  ].join("\n");
}

export function python({ seqr, ...body }) {
  const named = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base())}, api_key=os.environ["${VARIABLE}"])`,
    "answer = client.chat.completions.create(",
    ...named,
    `    extra_body=${literal({ seqr }, "    ")},`,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

// A JSON value in Python's notation. JSON's strings are Python's strings.
function literal(value, indent = "") {
  const deeper = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const many = Array.isArray(value);
  const items = many
    ? value.map((item) => literal(item, deeper))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, deeper)}`);
  const [open, shut] = many ? "[]" : "{}";
  const flat = `${open}${items.join(", ")}${shut}`;
  if (flat.length + indent.length < 80 && !flat.includes("\n")) return flat;
  return `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${shut}`;
}

export function showCode(body) {
  byId("code-curl").textContent = curl(body);
  byId("code-python").textContent = python(body);
  byId("code-status").textContent = "";
  byId("code").showModal();
}

for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", async () => {
    const source = byId(button.dataset.copies);
    const status = byId("code-status");
    try {
      await navigator.clipboard.writeText(source.textContent);
      status.textContent = "Copied.";
    } catch {
      // Browsers give pages no clipboard over plain HTTP, except on this machine.
      getSelection().selectAllChildren(source);
      status.textContent = "The browser does not let this page copy; the text is selected, copy it by hand.";
    }
  });
}
byId("code-close").addEventListener("click", () => byId("code").close());
