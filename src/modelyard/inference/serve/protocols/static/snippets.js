// The same request for other tools: a curl command and a few lines of Python.

import { el, newId } from "./dom.js";

const LONGEST = 4000;

/** Two snippets of a request with this URL and JSON body; a long body goes into a file beside them. */
export function snippets(url, body) {
  const inFile = body.length > LONGEST;
  const curl = `curl ${quoted(url)} -H 'Modelyard-Explain: true' -d ${inFile ? "@row.json" : quoted(body)}`;
  const python = [
    "import json",
    "import urllib.request",
    "",
    inFile
      ? 'body = open("row.json", "rb").read()'
      : `body = json.dumps(${pythonLiteral(JSON.parse(body))}).encode()`,
    `request = urllib.request.Request(${JSON.stringify(url)}, data=body, headers={"Modelyard-Explain": "true"})`,
    "with urllib.request.urlopen(request) as answer:",
    "    print(json.load(answer))",
  ].join("\n");
  return { curl, python, file: inFile ? body : null };
}

/** The snippets to look at and to copy. `current` returns {url, body} when asked. */
export function snippetsPanel(current) {
  const blocks = el("div");
  const panel = el(
    "details",
    { className: "snippets", ontoggle: () => panel.open && fill() },
    el("summary", {}, "The same with curl or Python"),
    blocks,
  );

  function fill() {
    let texts;
    try {
      const { url, body } = current();
      texts = snippets(url, body);
    } catch (error) {
      blocks.replaceChildren(el("p", { className: "quiet" }, error.message));
      return;
    }
    blocks.replaceChildren(
      ...(texts.file === null ? [] : [fileLine(texts.file)]),
      block("curl", texts.curl),
      block("Python", texts.python),
    );
  }

  return { element: panel, refresh: () => panel.open && fill() };
}

function block(title, text) {
  const id = newId();
  const status = el("span", { role: "status", className: "hint" });
  const code = el("pre", { tabIndex: 0, id, "aria-label": title }, text);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "copied";
    } catch {
      // no clipboard where the page came over plain HTTP from another machine
      getSelection().selectAllChildren(code);
      status.textContent = "selected: copy it with the keyboard";
    }
  };
  return el(
    "div",
    { className: "snippet" },
    el("h4", {}, title),
    el("button", { type: "button", className: "small", onclick: copy, "aria-controls": id }, "Copy"),
    status,
    code,
  );
}

function fileLine(body) {
  const save = () => {
    const link = el("a", {
      href: URL.createObjectURL(new Blob([body], { type: "application/json" })),
      download: "row.json",
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  return el(
    "p",
    {},
    "The row is long; save it beside the command: ",
    el("button", { type: "button", className: "small", onclick: save }, "Save row.json"),
  );
}

/** Quote for a POSIX shell. */
function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

export function pythonLiteral(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object")
    return `{${Object.entries(value)
      .map(([key, one]) => `${JSON.stringify(key)}: ${pythonLiteral(one)}`)
      .join(", ")}}`;
  return JSON.stringify(value);
}
