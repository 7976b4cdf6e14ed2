// What happened to a request, drawn to scale: read, queued, computed, answered.

import { el, shortMs } from "./dom.js";

/** `timeline` is the server's; `elapsedMs` what this browser saw, from sending to the whole answer. */
export function showTimeline(timeline, elapsedMs) {
  const steps = stepsOf(timeline);
  const total = Math.max(timeline.total_ms, 1e-6);
  let start = 0;
  const rows = steps.map(({ name, ms, note, kind }) => {
    const style = { left: `${(start / total) * 100}%`, width: `${(ms / total) * 100}%` };
    start += ms;
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, name, note ? el("span", { className: "hint" }, note) : null),
      el("td", { className: "lane" }, el("span", { className: kind, style })),
      el("td", { className: "number" }, shortMs(ms)),
    );
  });
  const whole = el(
    "tfoot",
    {},
    el(
      "tr",
      {},
      el("th", { scope: "row" }, "in all"),
      el("td", {}, timeline.deadline_ms ? `of ${shortMs(timeline.deadline_ms)} allowed` : ""),
      el("td", { className: "number" }, shortMs(timeline.total_ms)),
    ),
    el(
      "tr",
      {},
      el("th", { scope: "row" }, "seen from here"),
      el("td", {}, "with the network and this browser"),
      el("td", { className: "number" }, shortMs(elapsedMs)),
    ),
  );
  const caption = el("caption", {}, "Where the time went");
  return el(
    "div",
    {},
    el("table", { className: "timeline" }, caption, el("tbody", {}, rows), whole),
    el("p", { className: "sentence" }, sentence(timeline)),
  );
}

function stepsOf(timeline) {
  const steps = [];
  const admitted = timeline.admitted_after_ms;
  if (admitted === null) steps.push({ name: "read", ms: 0, kind: "read", note: `not admitted: ${timeline.cause}` });
  else steps.push({ name: "read", ms: admitted, kind: "read", note: "and admitted" });
  const batch = timeline.batch;
  if (batch) {
    steps.push({ name: "waited", ms: timeline.waited_ms, kind: "waited", note: timeline.started_because });
    const others = batch.requests - 1;
    const company =
      others > 0
        ? `with ${others} other${others > 1 ? "s" : ""}, ${batch.rows} rows`
        : batch.rows > 1
          ? `${batch.rows} rows`
          : "alone";
    steps.push({ name: "computed", ms: batch.compute_ms, kind: "computed", note: company });
  }
  const before = steps.reduce((sum, step) => sum + step.ms, 0);
  steps.push({ name: "answered", ms: Math.max(0, timeline.total_ms - before), kind: "read", note: "written" });
  return steps;
}

function sentence(timeline) {
  const text = timeline.summary;
  return `Request ${timeline.request_id}: ${text}${text.endsWith(".") ? "" : "."}`;
}
