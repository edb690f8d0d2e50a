// Progressive Dilation Schedule: the latent mask at every stage, and a handle per stage for its share of the steps.
import { el, fileUrl, input, instead, left, linked, origin, pixels, place, say, slide, valueOf, write } from "./page.js";
import { bounds, downsample, moved, parseKernels, sharesText, stages, unpacked } from "./logic/masks.js";

const NAME = "masks";
const PIXELS_PER_LATENT = 8; // before a run; the VAE is not asked
const INPUTS = ["kernels", "scale_with_size", "invert", "published_rule", "parts", "shares"];

export function strip(node) {
  const tiles = el("div", { class: "ek-stages" });
  const track = el("div", { class: "ek-track" });
  const note = el("div", { class: "ek-note" });
  const root = el("div", { class: "ek-column" }, tiles, track, note);
  instead(node, NAME, () => true);
  place(node, "editkit_masks", root, {
    height: () => 150,
    state: () => ({ mask: whereFrom(node), ...Object.fromEntries(INPUTS.map((name) => [name, valueOf(node, name)])) }),
    draw: async (now) => {
      drawAll(node, await readMask(now.mask), now, tiles, track, note);
    },
  });
}

// ---------- where the mask comes from
/** The last run's own mask, while it is of the connected nodes as they are now; else what a loader shows of it. */
function whereFrom(node) {
  const drawn = upstream(origin(node, "latent_mask"));
  const ran = left(node, NAME);
  if (ran && ran !== node.editkitRun?.ran) node.editkitRun = { ran, drawn: JSON.stringify(drawn) };
  if (ran && node.editkitRun.drawn === JSON.stringify(drawn)) return { exact: ran };
  return drawn;
}

function upstream(from) {
  if (from?.node.comfyClass !== "EditKit_LatentMask") return null;
  const options = { mode: input(from.node, "mode")?.value, threshold: input(from.node, "threshold")?.value };
  const found = pixelMask(origin(from.node, "mask"));
  return found && { ...found, ...options };
}

/** The file and the channel of a pixel mask that comes from a loader, or null. */
function pixelMask(from) {
  if (!from) return null;
  const kind = from.node.comfyClass;
  if (kind === "InvertMask") {
    const inner = pixelMask(origin(from.node, "mask"));
    return inner && { ...inner, inverted: !inner.inverted };
  }
  if (kind === "EditKit_LoadExample") return pixelMask(origin(from.node, "own_mask"));
  if (kind === "LoadImage" && from.slot === 1) return { file: input(from.node, "image")?.value, channel: 3, inverted: true };
  if (kind === "LoadImageMask") {
    const channel = ["red", "green", "blue", "alpha"].indexOf(input(from.node, "channel")?.value);
    return { file: input(from.node, "image")?.value, channel, inverted: channel === 3 };
  }
  return null;
}

async function readMask(found) {
  if (!found) return null;
  if (found.exact) {
    const { width, height, masks } = found.exact;
    return { width, height, masks: masks.map((hex) => unpacked(hex, width * height)), exact: true };
  }
  const [, path, type] = String(found.file ?? "").match(/^(.*?)(?: \[(\w+)\])?$/) ?? [];
  if (!path) return null;
  const cut = path.lastIndexOf("/");
  const url = fileUrl({ filename: path.slice(cut + 1), subfolder: path.slice(0, Math.max(0, cut)), type: type ?? "input" });
  try {
    const { data, width, height } = await pixels(url);
    const values = new Float32Array(width * height);
    for (let i = 0; i < values.length; i++) values[i] = data[4 * i + found.channel] / 255;
    if (found.inverted) for (let i = 0; i < values.length; i++) values[i] = 1 - values[i];
    const [columns, rows] = [width, height].map((side) => Math.ceil(side / PIXELS_PER_LATENT));
    return { width: columns, height: rows, masks: [downsample(values, width, height, columns, rows, found.mode, found.threshold)] };
  } catch {
    return null;
  }
}

// ---------- drawing
function drawAll(node, mask, now, tiles, track, note) {
  const kernels = parseKernels(now.kernels);
  const options = { invert: now.invert, scale: now.scale_with_size, published: now.published_rule };
  const shown = mask && kernels && stages(mask.masks[0], mask.width, mask.height, kernels, options);
  tiles.replaceChildren(...(shown ?? []).map((stage, i) => tile(stage, mask, kernels[i])));
  const own = now.parts === "equal steps" && !now.published_rule;
  const ends = kernels && own ? bounds(now.shares, kernels.length) : null;
  const kept = track.contains(document.activeElement) ? document.activeElement.dataset.stage : null;
  track.replaceChildren(...(ends ? handles(node, track, ends) : []));
  if (kept) track.querySelector(`[data-stage="${kept}"]`)?.focus({ preventScroll: true });
  note.textContent = said(kernels, mask, own, ends);
}

function said(kernels, mask, own, ends) {
  if (!kernels) return say("masks.kernels");
  if (own && !ends) return say("masks.shares", { count: kernels.length });
  if (!mask) return say("masks.empty");
  return say(mask.exact ? "masks.exact" : "masks.estimate", { width: mask.width, height: mask.height });
}

function tile(stage, { width, height }, kernel) {
  const canvas = el("canvas", { title: say("masks.kernel", { kernel }) });
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < stage.length; i++) image.data.set(stage[i] ? [240, 240, 240, 255] : [18, 18, 18, 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return el("div", { class: "ek-tile" }, canvas, el("span", {}, String(kernel)));
}

function handles(node, track, ends) {
  let now = ends;
  const parts = ends.map(() => el("span"));
  const show = () =>
    now.forEach((end, i) => {
      const share = Math.round(100 * (end - (i ? now[i - 1] : 0)));
      parts[i].style.flexGrow = String(Math.max(share, 0.001));
      parts[i].textContent = share > 7 ? `${share} %` : "";
      if (knobs[i]) knobs[i].style.left = `${100 * end}%`;
      knobs[i]?.setAttribute("aria-valuenow", Math.round(100 * end));
    });
  const knobs = ends.slice(0, -1).map((_, i) => {
    const label = say("masks.handle", { stage: i + 1 });
    const knob = el("i", { tabindex: 0, role: "slider", "data-stage": i, "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 });
    const put = (value) => {
      now = moved(now, i, value);
      show();
    };
    if (!linked(node, "shares")) slide(knob, track, { at: () => now[i], put, end: () => write(node, { shares: sharesText(now) }) });
    return knob;
  });
  show();
  return [...parts, ...knobs];
}
