// The page: which model is shown, its form, and what it answers. The address says which: #NAME or #NAME/VERSION.

import { showPredictions } from "./answer.js";
import { el } from "./dom.js";
import { FieldError, fieldFor } from "./fields.js";
import { snippetsPanel } from "./snippets.js";
import { showTimeline } from "./timeline.js";

const FILTER_FROM = 12;
const ASK_AGAIN_MS = 2000;

const main = document.getElementById("main");
const list = document.getElementById("models");
const filter = document.getElementById("filter");
const filterText = filter.querySelector("input");

let models = [];
let again = 0; // the timer that loads the list once more
let shown = ""; // what the panel was made for

async function getJson(path) {
  const answer = await fetch(path);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

// The list.

async function loadModels() {
  clearTimeout(again);
  try {
    ({ models } = await getJson("/docs/models"));
  } catch (error) {
    again = setTimeout(loadModels, ASK_AGAIN_MS);
    if (!shown) {
      const why = `The server does not answer: ${error.message}`;
      main.replaceChildren(el("p", { className: "fault", role: "alert" }, why));
    }
    return;
  }
  filter.hidden = models.length < FILTER_FROM;
  showList();
  await showPanel();
  if (models.some((model) => model.versions.some((version) => version.state === "loading")))
    again = setTimeout(loadModels, ASK_AGAIN_MS);
}

function showList() {
  const [name, version] = address();
  const wanted = filterText.value.toLowerCase();
  const items = models
    .filter((model) => model.name.toLowerCase().includes(wanted))
    .map((model) => {
      const others = model.versions.length > 1;
      return el(
        "li",
        {},
        model.versions.map((one) => {
          const current = model.name === name && one.version === version;
          const link = el(
            "a",
            { href: addressOf(model.name, one) },
            model.name,
            others || !one.default ? ` ${one.version}` : null,
          );
          if (current) link.setAttribute("aria-current", "page");
          return el(
            "div",
            {},
            link,
            one.state === "ready" ? null : el("span", { className: `state ${one.state}` }, one.state),
          );
        }),
      );
    });
  list.replaceChildren(
    ...(items.length
      ? items
      : [el("li", { className: "quiet" }, models.length ? "no name fits" : "no models")]),
  );
}

function address() {
  const [name, version] = location.hash.slice(1).split("/");
  const model = models.find((one) => one.name === name) ?? (name ? undefined : models[0]);
  if (!model) return [name, Number(version)];
  const found = version
    ? model.versions.find((one) => String(one.version) === version)
    : model.versions.find((one) => one.default);
  return [model.name, found?.version];
}

function addressOf(name, version) {
  return `#${name}${version.default ? "" : `/${version.version}`}`;
}

// The panel of one version.

async function showPanel() {
  const [name, number] = address();
  const version = models.find((model) => model.name === name)?.versions.find((one) => one.version === number);
  const key = `${name}/${number}/${version?.state}`;
  if (key === shown) return; // keep what somebody has typed
  shown = key;
  document.title = name ? `${name}: Modelyard` : "Modelyard";
  if (!version) {
    main.replaceChildren(
      el(
        "p",
        {},
        models.length
          ? `There is no model ${name}${number ? ` version ${number}` : ""} here.`
          : "No model is served yet.",
      ),
    );
    return;
  }
  let model;
  try {
    model = await getJson(`/docs/models/${encodeURIComponent(name)}/versions/${number}`);
  } catch (error) {
    const why = version.reason || error.message;
    main.replaceChildren(
      el(
        "div",
        { className: "title" },
        el("h2", {}, name),
        el("p", { className: "quiet" }, `version ${number} · ${version.state}`),
      ),
      el("p", { className: "fault" }, why),
    );
    return;
  }
  if (key === shown) main.replaceChildren(...panelOf(model));
}

function panelOf(model) {
  const path = `/v1/models/${encodeURIComponent(model.name)}${model.default ? "" : `/versions/${model.version}`}:predict`;
  const facts = [`version ${model.version}`];
  if (model.target_ms)
    facts.push(
      `aims to answer within ${model.target_ms < 1000 ? `${model.target_ms} ms` : `${model.target_ms / 1000} s`}`,
    );
  const row = rowEditor(model);
  const result = el("div", { className: "result", "aria-live": "polite" });
  const same = snippetsPanel(() => ({ url: location.origin + path, body: row.body() }));
  const send = el("button", { type: "submit", className: "main" }, "Predict");
  const edited = () => {
    same.refresh();
    result.classList.add("old"); // it answers another row than the one that stands there now
  };
  const form = el(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        ask();
      },
      oninput: edited,
      onchange: edited,
    },
    row.element,
    el(
      "div",
      { className: "actions" },
      send,
      el("button", { type: "button", onclick: row.reset }, "Back to the example"),
    ),
  );
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });

  async function ask() {
    let body;
    try {
      body = row.body();
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      result.replaceChildren(el("p", { className: "fault", role: "alert" }, error.message));
      result.classList.remove("old");
      error.element?.focus();
      return;
    }
    send.disabled = true;
    result.classList.add("old");
    const start = performance.now();
    try {
      const answer = await fetch(path, {
        method: "POST",
        body,
        headers: { "Content-Type": "application/json", "Modelyard-Explain": "true" },
      });
      const text = await answer.text();
      result.replaceChildren(...resultOf(answer, text, model, performance.now() - start));
    } catch (error) {
      result.replaceChildren(
        el("p", { className: "fault", role: "alert" }, `The server did not answer: ${error.message}`),
      );
    }
    result.classList.remove("old");
    result.scrollIntoView({ block: "nearest" });
    send.disabled = false;
  }

  return [
    el(
      "div",
      { className: "title" },
      el("h2", {}, model.name),
      el("p", { className: "quiet" }, facts.join(" · ")),
    ),
    el("div", { className: "columns" }, form, result),
    same.element,
  ];
}

function resultOf(answer, text, model, elapsedMs) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    value = { error: text.slice(0, 1000) };
  }
  const parts = [];
  if (answer.ok && Array.isArray(value.predictions))
    parts.push(showPredictions(value.predictions, model.outputs));
  else if (answer.ok) parts.push(el("pre", {}, JSON.stringify(value.outputs ?? value, null, 2).slice(0, 5000)));
  else {
    const again = answer.headers.get("Retry-After");
    parts.push(
      el(
        "p",
        { className: "fault", role: "alert" },
        `${answer.status}: ${value.error}${again ? ` (try again in ${again} s)` : ""}`,
      ),
    );
  }
  if (value.timeline) parts.push(showTimeline(value.timeline, elapsedMs));
  return parts;
}

/** The row as a form or, for whoever wants more rows or other bodies, as JSON. */
function rowEditor(model) {
  const element = el("div");
  let fields = [];
  let json = null; // the text area, while that is what is edited

  function fromFields() {
    const columns = fields.map(([name, field]) => `${JSON.stringify(name)}: ${field.read()}`);
    return `{"instances": [{${columns.join(", ")}}]}`;
  }

  function body() {
    if (json === null) return fromFields();
    try {
      JSON.parse(json.value);
    } catch (error) {
      throw new FieldError(`This is no JSON: ${error.message}`, json);
    }
    return json.value;
  }

  function tab(text, isCurrent, action) {
    return el(
      "button",
      { type: "button", className: "tab", "aria-pressed": String(isCurrent), onclick: action },
      text,
    );
  }

  function show(...content) {
    const tabs = el(
      "div",
      { className: "tabs" },
      tab("Form", json === null, showForm),
      tab("JSON", json !== null, showJson),
    );
    element.replaceChildren(tabs, ...content);
  }

  function showForm() {
    json = null;
    show(
      el(
        "div",
        { className: "fields" },
        fields.map(([, field]) => field.element),
      ),
    );
  }

  function showJson() {
    if (json !== null) return;
    let text;
    try {
      text = fromFields();
    } catch (error) {
      error.element?.focus();
      return;
    }
    json = el("textarea", {
      className: "body",
      rows: 16,
      spellcheck: false,
      value: text,
      "aria-label": "The body of the request",
    });
    show(json);
  }

  function reset() {
    fields = model.inputs.map((column) => [column.name, fieldFor(column, model.example?.[column.name])]);
    showForm();
    element.dispatchEvent(new Event("input", { bubbles: true }));
  }

  reset();
  return { element, body, reset };
}

filterText.addEventListener("input", showList);
window.addEventListener("hashchange", async () => {
  showList();
  await showPanel();
  main.focus({ preventScroll: true });
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) loadModels(); // versions may have come and gone meanwhile
});
loadModels();
