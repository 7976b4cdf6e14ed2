// A field for each column of a row, by its datatype and shape. A field has an `element` and `read()`: its value as JSON text,
// so that whole numbers keep every digit; it throws FieldError where nothing fits.

import { el, labelled, newId } from "./dom.js";
import { imageField, imageLayout } from "./image.js";

const MOST_OPTIONS = 200;
const RANGES = {
  INT8: [-128, 127],
  INT16: [-32768, 32767],
  INT32: [-2147483648, 2147483647],
  INT64: ["-9223372036854775808", "9223372036854775807"],
  UINT8: [0, 255],
  UINT16: [0, 65535],
  UINT32: [0, 4294967295],
  UINT64: [0, "18446744073709551615"],
};

export class FieldError extends Error {
  constructor(message, element) {
    super(message);
    this.element = element;
  }
}

export function fieldFor(column, example) {
  const sizes = column.sizes.filter((size) => size !== 1);
  if (sizes.length > 0) {
    const layout = imageLayout(column, example);
    return layout ? imageField(column, layout, example) : listField(column, example);
  }
  const value = unwrapped(example);
  if (column.datatype === "BOOL") return flagField(column, value);
  if (column.datatype !== "BYTES") return numberField(column, value);
  const few = column.categories && column.categories.length <= MOST_OPTIONS;
  return few ? categoryField(column, value) : textField(column, value);
}

function numberField(column, example) {
  const range = RANGES[column.datatype];
  const control = el("input", {
    type: "number",
    step: range ? "1" : "any",
    required: !column.nullable || Boolean(range),
    value: example ?? "",
    inputMode: range ? "numeric" : "decimal",
    autocomplete: "off",
  });
  if (range) [control.min, control.max] = range;
  // Nobody needs to be told of a range beyond what anybody would type.
  const hint = !range
    ? "number"
    : range[1] < 1e5
      ? `whole number, ${range[0]} to ${range[1]}`
      : range[0] === 0
        ? "whole number, not negative"
        : "whole number";
  const element = labelled(column, control, control.required ? hint : `${hint}; empty is missing`);
  return {
    element,
    read() {
      const text = control.value;
      if (text === "") return "null";
      return range && /^-?\d+$/.test(text) ? BigInt(text).toString() : JSON.stringify(Number(text));
    },
  };
}

function flagField(column, example) {
  const control = el("input", { type: "checkbox", checked: example === true });
  return { element: labelled(column, control, "yes or no"), read: () => String(control.checked) };
}

function textField(column, example) {
  const control = el("input", { type: "text", value: example ?? "", autocomplete: "off", spellcheck: false });
  let choices = null;
  if (column.categories) {
    choices = el(
      "datalist",
      { id: newId() },
      column.categories.slice(0, 2000).map((value) => el("option", { value })),
    );
    control.setAttribute("list", choices.id);
  }
  const kind = column.categories ? `text; ${column.categories.length} values were seen in training` : "text";
  const element = labelled(column, control, column.nullable ? `${kind}; empty is missing` : kind, choices);
  return {
    element,
    read: () => (column.nullable && control.value === "" ? "null" : JSON.stringify(control.value)),
  };
}

/** The categories seen in training, and a way to send another text. */
function categoryField(column, example) {
  const known = column.categories.includes(example);
  const missing = example === null || example === undefined || example === "";
  const select = el(
    "select",
    {},
    column.categories.map((value) => el("option", { value: `=${value}`, selected: value === example }, value)),
  );
  if (column.nullable) select.append(el("option", { value: "missing", selected: missing }, "(missing)"));
  select.append(
    el("option", { value: "other", selected: !known && !(missing && column.nullable) }, "another text…"),
  );
  const other = el("input", {
    type: "text",
    value: known ? "" : (example ?? ""),
    placeholder: "a text never seen in training",
    autocomplete: "off",
    spellcheck: false,
    "aria-label": `${column.name}, another text`,
  });
  const show = () => {
    other.hidden = select.value !== "other";
  };
  select.addEventListener("change", () => {
    show();
    if (!other.hidden) other.focus();
  });
  show();
  return {
    element: labelled(column, select, "", other),
    read() {
      if (select.value === "missing") return "null";
      return JSON.stringify(select.value === "other" ? other.value : select.value.slice(1));
    },
  };
}

/** Lists of any depth, as JSON; one axis may also be numbers between commas or blanks. */
function listField(column, example) {
  const sizes = column.sizes;
  const text = example === null || example === undefined ? "" : pretty(example);
  const control = el("textarea", {
    value: text,
    rows: Math.min(8, Math.max(2, Math.ceil(text.length / 60))),
    spellcheck: false,
    required: true,
  });
  const kind = column.datatype === "BYTES" ? "texts" : "numbers";
  const shape = sizes.map((size) => size ?? "any").join(" × ");
  const element = labelled(
    column,
    control,
    sizes.length === 1 ? `${shape} ${kind}` : `${shape} ${kind}, as nested lists`,
  );
  return {
    element,
    read() {
      const given = control.value.trim();
      const list =
        given.startsWith("[") || sizes.length > 1 || column.datatype === "BYTES"
          ? given
          : `[${given.split(/[\s,;]+/).join(", ")}]`;
      let value;
      try {
        value = JSON.parse(list);
      } catch (error) {
        throw new FieldError(`${column.name} must be a list: ${error.message}`, control);
      }
      if (sizes.length === 1 && sizes[0] !== null && Array.isArray(value) && value.length !== sizes[0]) {
        throw new FieldError(`${column.name} takes ${sizes[0]} values, got ${value.length}`, control);
      }
      return list;
    },
  };
}

/** JSON with a blank after each comma, so that lines can break. */
export function pretty(value) {
  if (Array.isArray(value)) return `[${value.map(pretty).join(", ")}]`;
  return JSON.stringify(value);
}

function unwrapped(value) {
  while (Array.isArray(value) && value.length === 1) [value] = value;
  return value;
}
