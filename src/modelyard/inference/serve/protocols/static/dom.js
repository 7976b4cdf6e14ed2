// Elements. Names and labels come from strangers: children that are strings become text, never markup.

/** Make an element: properties by name, "on…" as listeners, "aria-…" and "data-…" as attributes; null children are left out. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "for" || name === "list" || name === "role")
      element.setAttribute(name, value);
    else if (name === "style")
      Object.assign(element.style, value); // by script: the policy allows no style attributes
    else element[name] = value;
  }
  element.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

let n_ids = 0;

export function newId() {
  n_ids += 1;
  return `id${n_ids}`;
}

/** A number as a person reads it: at most five digits that mean something. */
export function shortNumber(value) {
  if (typeof value !== "number") return value === null ? "–" : String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e7)
    ? value.toExponential(2)
    : String(Number(value.toPrecision(5)));
}

/** A time, to a hundredth of a millisecond where that can be read. */
export function shortMs(ms) {
  if (ms >= 1000) return `${Number((ms / 1000).toPrecision(4))} s`;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

/** A column's control between its label and what there is to know of it. */
export function labelled(column, control, hint, ...more) {
  control.id = newId();
  const about = el(
    "p",
    { className: "hint", id: newId() },
    [column.description, hint].filter(Boolean).join(" · "),
  );
  control.setAttribute("aria-describedby", about.id);
  const unit = column.unit ? el("span", { className: "unit" }, ` ${column.unit}`) : null;
  return el(
    "div",
    { className: "field" },
    el("label", { for: control.id }, column.name, unit),
    control,
    ...more,
    about,
  );
}
