// What every widget needs of the page: elements, strings, input values, outputs of a run, and a place on the node.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { CSS } from "./style.js";
import { clamp, fill } from "./logic/text.js";

const TICK = 200; // milliseconds between two looks at the inputs
const COLOURS = {
  EDITKIT_EMBEDDINGS: "#d8a657",
  EDITKIT_MASK_SCHEDULE: "#7fb77e",
  EDITKIT_PROMPT_EDIT: "#e08fb0",
  EDITKIT_RANKER: "#6fb3d2",
  EDITKIT_TRAJECTORY: "#a58fd8",
};

// ---------- strings
let strings = {};

/** The sentences of locales/LANGUAGE/main.json, English where a translation lacks one. */
export async function loadStrings() {
  try {
    const found = await (await api.fetchApi("/i18n")).json();
    const language = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
    strings = { ...found.en?.editkit, ...found[language]?.editkit };
  } catch (error) {
    console.warn("EditKit: no translations", error);
  }
  for (const widget of live) widget.shown = undefined;
}

/** The sentence `key` with its {names} filled in; the key itself where there is none. */
export const say = (key, values) => fill(strings[key] ?? key, values);

// ---------- elements
/** An element with attributes, listeners (`onclick`) and children; text becomes text nodes, never markup. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") made.style.cssText = value;
    else if (value !== false && value !== undefined && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The address of an image that a run has left, or of one in the input folder. */
export function fileUrl(file) {
  const query = { filename: file.filename, subfolder: file.subfolder ?? "", type: file.type ?? "temp" };
  return api.apiURL(`/view?${new URLSearchParams(query)}`);
}

/** The pixels (ImageData) of an image, at `width` x `height` or its own size. */
export async function pixels(url, width, height) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = el("canvas");
  canvas.width = width ?? image.naturalWidth;
  canvas.height = height ?? image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

// ---------- input values
export const input = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Whether another node gives this input. */
export const linked = (node, name) => (node.inputs ?? []).some((slot) => slot.name === name && slot.link != null);

/** The node and output slot that are connected to an input, or null. */
export function origin(node, name) {
  const slot = node.inputs?.find((entry) => entry.name === name);
  if (slot?.link == null || !node.graph) return null;
  const link = node.graph.getLink?.(slot.link) ?? node.graph.links?.[slot.link];
  const from = link && node.graph.getNodeById(link.origin_id);
  return from ? { node: from, slot: link.origin_slot } : null;
}

/** The value of an input, or of the text node that is connected to it; undefined where only a run knows it. */
export function valueOf(node, name) {
  const from = origin(node, name);
  if (!from) return input(node, name)?.value;
  return from.node.widgets?.find((widget) => typeof widget.value === "string")?.value;
}

/** Write an input as if it had been typed, as one step that can be undone. */
export function write(node, values) {
  const changed = Object.entries(values).filter(([name, value]) => input(node, name) && input(node, name).value !== value);
  if (!changed.length) return;
  node.graph?.beforeChange?.();
  for (const [name, value] of changed) {
    const widget = input(node, name);
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  node.graph?.afterChange?.();
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
  app.canvas?.setDirty?.(true, true);
  tick();
}

// ---------- widgets on a node
const live = new Set();

/**
 * A DOM widget at the end of a node. It keeps no value of its own: `serialize` is off in the workflow and in the prompt.
 * `look` = {height(), most(), state(), draw(state), removed()}: least and largest height; `draw` is called when `state()`
 * (JSON) has changed, never more often.
 */
export function place(node, name, root, look) {
  root.classList.add("editkit");
  for (const kind of ["pointerdown", "mousedown", "dblclick", "contextmenu"]) {
    root.addEventListener(kind, (event) => event.stopPropagation());
  }
  const options = { serialize: false, hideOnZoom: false, margin: 6, getMinHeight: () => look.height(), getMaxHeight: look.most };
  const widget = node.addDOMWidget(name, "editkit", root, options);
  widget.serialize = false;
  const entry = { node, look, shown: undefined };
  live.add(entry);
  const removed = node.onRemoved;
  node.onRemoved = function (...given) {
    live.delete(entry);
    look.removed?.();
    return removed?.apply(this, given);
  };
  return { redraw: () => refresh(entry, true) };
}

function refresh(entry, force = false) {
  if (dragging) return;
  const state = entry.look.state();
  const key = JSON.stringify(state);
  if (!force && key === entry.shown) return;
  entry.shown = key;
  entry.look.draw(state);
  grow(entry.node);
}

/** Make room for what the node shows; a node that was made larger by hand stays. */
function grow(node) {
  const least = node.computeSize?.();
  if (!least || !node.graph || node.flags?.collapsed) return;
  if (node.size[1] < least[1]) node.setSize?.([node.size[0], least[1]]);
  app.canvas?.setDirty?.(true, true);
}

function tick() {
  paintSockets(); // a change of the colour palette empties them
  for (const entry of live) if (entry.node.graph) refresh(entry);
}

let dragging = false; // nothing is drawn anew meanwhile

/** Follow the pointer from a press on `target`: `move(event, press)` for every move, then `end()`. */
export function follow(target, move, end = () => {}) {
  target.addEventListener("pointerdown", (press) => {
    if (press.button !== 0) return;
    const step = (event) => move(event, press);
    dragging = true;
    target.setPointerCapture(press.pointerId);
    target.addEventListener("pointermove", step);
    const stop = () => {
      dragging = false;
      target.removeEventListener("pointermove", step);
      end();
      setTimeout(tick); // after the click that this may be
    };
    target.addEventListener("pointerup", stop, { once: true });
  });
}

/** A handle that moves along its track by pointer and arrow keys: `put(fraction)`, then `end()`; `at()` is where it is. */
export function slide(handle, track, { at, put, end }) {
  follow(handle, (event) => put(along(track, event)), end);
  handle.addEventListener("pointerdown", () => handle.focus({ preventScroll: true }));
  handle.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 0.05, ArrowLeft: -0.05 }[event.key];
    if (!by) return;
    taken(event);
    put(at() + by);
    end();
  });
}

/** Where the pointer is along an element, 0 to 1. */
export function along(element, event) {
  const box = element.getBoundingClientRect();
  return clamp((event.clientX - box.left) / box.width, 0, 1);
}

/** Keep an event from the page behind. */
export function taken(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** Make the widget of a node that was just created. */
export function onNode(node, make) {
  if (!live.ticking) {
    live.ticking = setInterval(tick, TICK);
    document.head.append(el("style", {}, CSS));
  }
  make(node);
}

/** What the last run has left for this node under `editkit_NAME`, or undefined. */
export function left(node, name) {
  const outputs = app.nodeOutputs ?? {};
  const found = node.editkitOutput ?? outputs[node.id] ?? outputs[`${node.graph?.id}:${node.id}`];
  return found?.[`editkit_${name}`]?.[0];
}

/** Keep a node's output, and show EditKit's widget instead of the host's image preview while `when()`: with `name` by default. */
export function instead(node, name, when = () => Boolean(left(node, name))) {
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    this.editkitOutput = output;
    tick();
  };
  Object.defineProperty(node, "hideOutputImages", { get: when, set() {}, configurable: true });
  const background = node.onDrawBackground;
  node.onDrawBackground = function (...given) {
    if (!when()) return background?.apply(this, given);
    const at = this.imgs ? this.widgets.findIndex((widget) => widget.name === "$$canvas-image-preview") : -1;
    if (at >= 0) this.widgets.splice(at, 1)[0].onRemove?.();
    this.imgs = undefined;
  };
}

export function paintSockets() {
  const colours = app.canvas?.default_connection_color_byType;
  if (!colours || colours.EDITKIT_RANKER === COLOURS.EDITKIT_RANKER) return;
  for (const [type, colour] of Object.entries(COLOURS)) {
    colours[type] = colour;
    const shared = window.LGraphCanvas?.link_type_colors;
    if (shared) shared[type] = colour;
  }
}
