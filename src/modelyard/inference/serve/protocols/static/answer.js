// Predictions as a person reads them: the label first, scores as bars, anything else as it came.

import { el, shortNumber } from "./dom.js";

const MOST_ROWS = 20;
const MOST_BARS = 10;
const LONGEST_VECTOR = 1000;

export function showPredictions(predictions, outputs) {
  const shown = predictions.slice(0, MOST_ROWS).map((prediction, i) => {
    const parts =
      outputs.length === 1
        ? [[outputs[0], prediction]]
        : outputs.map((column) => [column, prediction[column.name]]);
    // A label says most, so it comes first.
    parts.sort(([a], [b]) => rank(a) - rank(b));
    const title = predictions.length > 1 ? el("h3", {}, `Row ${i}`) : null;
    return el(
      "section",
      { className: "prediction" },
      title,
      parts.map(([column, value]) => showOutput(column, value)),
    );
  });
  const rest = predictions.length - shown.length;
  return el("div", {}, shown, rest > 0 ? el("p", { className: "quiet" }, `and ${rest} more rows`) : null);
}

function rank(column) {
  return column.labels && column.sizes.length === 0 ? 0 : column.labels ? 1 : 2;
}

function showOutput(column, value) {
  const name = el(
    "h4",
    {},
    column.name,
    column.unit ? el("span", { className: "unit" }, ` ${column.unit}`) : null,
  );
  return el("div", { className: "output" }, name, shownValue(column, value));
}

function shownValue(column, value) {
  if (value === null || typeof value !== "object") {
    return el(
      "p",
      { className: "value" },
      typeof value === "number" && !column.labels ? shortNumber(value) : String(value ?? "missing"),
    );
  }
  if (!Array.isArray(value)) return bars(Object.entries(value), true);
  const isVector =
    value.length > 0 &&
    value.length <= LONGEST_VECTOR &&
    value.every((one) => typeof one === "number" || one === null);
  if (isVector)
    return bars(
      value.map((score, i) => [String(column.labels?.[i] ?? i), score]),
      Boolean(column.labels),
    );
  return el("pre", {}, JSON.stringify(value).slice(0, 5000));
}

/** A bar per score; labelled ones begin with the best. */
function bars(scores, sorted) {
  const order = sorted ? [...scores].sort(([, a], [, b]) => (b ?? -Infinity) - (a ?? -Infinity)) : scores;
  const sizes = order.map(([, score]) => Math.abs(score ?? 0));
  const full = Math.max(1, ...sizes); // probabilities keep their scale
  const shares = order.every(([, score]) => score !== null && score >= 0 && score <= 1);
  const text = (score) => (shares ? score.toFixed(4) : shortNumber(score));
  const row = ([label, score]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", title: label }, label),
      el(
        "td",
        { className: "bar" },
        el("span", {
          className: score < 0 ? "below" : "",
          style: { width: `${(Math.abs(score ?? 0) / full) * 100}%` },
        }),
      ),
      el("td", { className: "number" }, text(score)),
    );
  const body = el("tbody", {}, order.slice(0, MOST_BARS).map(row));
  const table = el("table", { className: "bars" }, body);
  if (order.length <= MOST_BARS) return table;
  const more = el(
    "button",
    {
      type: "button",
      className: "small",
      onclick: () => {
        body.append(...order.slice(MOST_BARS).map(row));
        more.remove();
      },
    },
    `Show all ${order.length}`,
  );
  return el("div", {}, table, more);
}
