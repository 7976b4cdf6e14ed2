// An image for a column of pixels: drop a picture, choose a file or, where it is grey, draw. It is brought to the model's size here.

import { el, labelled, newId } from "./dom.js";

const SMALLEST = 8;
const SHOWN_PX = 196;
const SCALES = { "0 to 255": [0, 255], "0 to 1": [0, 1], "−1 to 1": [-1, 1] };

/** How a column lays out an image, or null where it holds none: {height, width, channels, channelsFirst, range}. */
export function imageLayout(column, example) {
  if (column.datatype !== "UINT8" && !column.datatype.startsWith("FP")) return null;
  const sizes = column.sizes;
  const isSide = (size) => size !== null && size >= SMALLEST;
  const isDepth = (size) => size === 1 || size === 3;
  let found = null;
  if (sizes.length === 2 && sizes.every(isSide))
    found = { height: sizes[0], width: sizes[1], channels: 1, flat: true };
  else if (sizes.length === 3 && isDepth(sizes[2]))
    found = { height: sizes[0], width: sizes[1], channels: sizes[2] };
  else if (sizes.length === 3 && isDepth(sizes[0]))
    found = { height: sizes[1], width: sizes[2], channels: sizes[0], channelsFirst: true };
  if (!found || !isSide(found.height) || !isSide(found.width)) return null;
  const numbers = example === null || example === undefined ? [] : [example].flat(Infinity);
  const [low, high] = numbers.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  found.range = column.datatype === "UINT8" || high > 2 ? "0 to 255" : low < 0 ? "−1 to 1" : "0 to 1";
  if (low < -1.5) found.standardised = [low, high]; // no scale that could be guessed: show it, stretched
  return found;
}

export function imageField(column, layout, example) {
  const { height, width, channels } = layout;
  const canvas = el("canvas", {
    width,
    height,
    className: "image",
    tabIndex: 0,
    role: "img",
    "aria-label": `${column.name}: ${width} by ${height} pixels`,
  });
  const scale = SHOWN_PX / Math.max(width, height);
  Object.assign(canvas.style, { width: `${width * scale}px`, height: `${height * scale}px` });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let untouched = example ?? null; // sent as it is until somebody changes the picture
  if (untouched !== null) context.putImageData(pixelsOf(untouched, layout), 0, 0);
  else blacken();

  function blacken() {
    context.fillStyle = "black";
    context.fillRect(0, 0, width, height);
  }

  function changed() {
    untouched = null;
    canvas.dispatchEvent(new Event("input", { bubbles: true }));
  }

  const status = el("span", { role: "status", className: "hint" });

  async function show(file) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      status.textContent = `${file.name || "That"} is no picture this browser can read.`;
      return;
    }
    blacken();
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    if (channels === 1) grey();
    status.textContent = `${file.name || "picture"}, brought from ${bitmap.width} × ${bitmap.height} to ${width} × ${height}`;
    changed();
  }

  function grey() {
    const image = context.getImageData(0, 0, width, height);
    for (let i = 0; i < image.data.length; i += 4) {
      const level = Math.round(0.299 * image.data[i] + 0.587 * image.data[i + 1] + 0.114 * image.data[i + 2]);
      image.data.fill(level, i, i + 3);
    }
    context.putImageData(image, 0, 0);
  }

  function invert() {
    const image = context.getImageData(0, 0, width, height);
    for (let i = 0; i < image.data.length; i += 1) if (i % 4 !== 3) image.data[i] = 255 - image.data[i];
    context.putImageData(image, 0, 0);
    changed();
  }

  const chooser = el("input", {
    type: "file",
    accept: "image/*",
    className: "file",
    onchange: () => chooser.files[0] && show(chooser.files[0]),
  });
  const button = (text, action) => el("button", { type: "button", className: "small", onclick: action }, text);
  const range = el(
    "select",
    { id: newId() },
    Object.keys(SCALES).map((name) => el("option", { selected: name === layout.range }, name)),
  );
  range.addEventListener("change", changed);
  const choosesRange = column.datatype !== "UINT8";
  const tools = el(
    "div",
    { className: "tools" },
    el("label", {}, "Picture ", chooser),
    button("Invert", invert),
    button("Clear", () => {
      blacken();
      changed();
    }),
    choosesRange ? el("label", {}, "Pixels as ", range) : null,
  );

  for (const name of ["dragenter", "dragover"]) {
    canvas.addEventListener(name, (event) => {
      event.preventDefault();
      canvas.classList.add("over");
    });
  }
  canvas.addEventListener("dragleave", () => canvas.classList.remove("over"));
  canvas.addEventListener("drop", (event) => {
    event.preventDefault();
    canvas.classList.remove("over");
    if (event.dataTransfer.files[0]) show(event.dataTransfer.files[0]);
  });
  if (channels === 1) canDraw(canvas, context, changed);

  const hint =
    channels === 1 ? "drop a picture here, choose one, or draw" : "drop a picture here or choose one";
  const shape = `${height} × ${width}${layout.flat ? "" : ` × ${channels}`} pixels`;
  return {
    element: labelled(column, canvas, `${shape}; ${hint}`, tools, status),
    read() {
      if (untouched !== null) return JSON.stringify(untouched);
      const whole = column.datatype.startsWith("UINT");
      return JSON.stringify(
        valuesOf(
          context.getImageData(0, 0, width, height),
          layout,
          SCALES[choosesRange ? range.value : "0 to 255"],
          whole,
        ),
      );
    },
  };
}

/** Let a pointer draw in white. */
function canDraw(canvas, context, changed) {
  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height,
    ];
  };
  const stroke = (from, to) => {
    Object.assign(context, {
      strokeStyle: "white",
      lineWidth: Math.max(1.6, canvas.width / 12),
      lineCap: "round",
    });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
  };
  canvas.classList.add("drawable");
  canvas.addEventListener("pointerdown", (event) => {
    last = place(event);
    canvas.setPointerCapture(event.pointerId);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last) {
      const next = place(event);
      stroke(last, next);
      last = next;
    }
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => {
      if (last) {
        last = null;
        changed();
      }
    });
}

/** Nested lists → pixels to look at. */
function pixelsOf(lists, layout) {
  const { height, width, channels, channelsFirst, flat } = layout;
  const [low, high] = layout.standardised ?? SCALES[layout.range];
  const image = new ImageData(width, height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      for (let c = 0; c < 3; c += 1) {
        const k = Math.min(c, channels - 1);
        const value = channelsFirst ? lists[k][y][x] : flat ? lists[y][x] : [lists[y][x]].flat()[k];
        image.data[(y * width + x) * 4 + c] = ((value - low) / (high - low)) * 255;
      }
      image.data[(y * width + x) * 4 + 3] = 255;
    }
  }
  return image;
}

/** Pixels → nested lists in the model's layout and range. */
function valuesOf(image, layout, [low, high], whole) {
  const { height, width, channels, channelsFirst, flat } = layout;
  const value = (y, x, c) => {
    const level = image.data[(y * width + x) * 4 + c];
    return whole ? level : Number((low + (level / 255) * (high - low)).toFixed(5));
  };
  const range = (n, make) => Array.from({ length: n }, (_, i) => make(i));
  if (channelsFirst) return range(channels, (c) => range(height, (y) => range(width, (x) => value(y, x, c))));
  return range(height, (y) =>
    range(width, (x) => (flat ? value(y, x, 0) : range(channels, (c) => value(y, x, c)))),
  );
}
