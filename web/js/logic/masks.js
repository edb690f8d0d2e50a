// Latent masks and their schedules, as pipelines/core/masks.py computes them.

const PAPER_SIDE = 32;

/** The kernels of a text such as "7, 5, 3, 1", or null where the node would refuse them. */
export function parseKernels(text) {
  const parts = (text ?? "").split(/[,;]/).map((part) => part.trim()).filter(Boolean);
  const kernels = parts.map(Number);
  const odd = kernels.every((kernel) => Number.isInteger(kernel) && kernel >= 1 && kernel % 2 === 1);
  const falling = kernels.every((kernel, i) => !i || kernel <= kernels[i - 1]);
  return kernels.length && odd && falling && kernels.at(-1) === 1 ? kernels : null;
}

/** A kernel tuned on 32 latent pixels, for a shorter side of `side`. */
export function scaledKernel(kernel, side) {
  const radius = (kernel - 1) / 2;
  return radius ? 2 * Math.max(1, roundHalfEven((radius * side) / PAPER_SIDE)) + 1 : 1;
}

/** As Python rounds. */
function roundHalfEven(value) {
  const down = Math.floor(value);
  if (value - down !== 0.5) return Math.round(value);
  return down % 2 ? down + 1 : down;
}

/** Dilation of a binary mask (Uint8Array) by a square of `kernel` pixels; outside the image counts as 0. */
export function dilate(mask, width, height, kernel) {
  const radius = (kernel - 1) / 2;
  if (!radius) return mask;
  const along = (from, count, length, stride, step) => {
    const to = new Uint8Array(from.length);
    for (let line = 0; line < count; line++) {
      for (let at = 0; at < length; at++) {
        if (!from[line * stride + at * step]) continue;
        const end = Math.min(length - 1, at + radius);
        for (let near = Math.max(0, at - radius); near <= end; near++) to[line * stride + near * step] = 1;
      }
    }
    return to;
  };
  return along(along(mask, height, width, width, 1), width, height, 1, width);
}

/** The mask of every stage. `mask` holds 0 and 1; `published` inverts after the dilation. */
export function stages(mask, width, height, kernels, { invert = false, scale = false, published = false } = {}) {
  const flip = (values) => values.map((value) => 1 - value);
  const sizes = scale ? kernels.map((kernel) => scaledKernel(kernel, Math.min(width, height))) : kernels;
  const start = invert && !published ? flip(mask) : mask;
  const masks = sizes.map((kernel) => dilate(start, width, height, kernel));
  return invert && published ? masks.map(flip) : masks;
}

/** A binary mask on a latent grid of a pixel mask (values 0 to 1), by the rule of Latent Mask Downsample. */
export function downsample(values, width, height, columns, rows, mode, threshold) {
  const mask = new Uint8Array(columns * rows);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [left, right] = span(column, columns, width);
      const [top, bottom] = span(row, rows, height);
      let largest = 0;
      let sum = 0;
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) {
          const value = values[y * width + x];
          sum += value;
          if (value > largest) largest = value;
        }
      }
      const centre = values[((top + bottom) >> 1) * width + ((left + right) >> 1)];
      const value = mode === "max" ? largest : mode === "area" ? sum / ((right - left) * (bottom - top)) : centre;
      mask[row * columns + column] = value >= (threshold > 0 ? threshold : 0.5) ? 1 : 0;
    }
  }
  return mask;
}

const span = (i, count, length) => [Math.floor((i * length) / count), Math.ceil(((i + 1) * length) / count)];

/** The bits of a hexadecimal text, first bit first. */
export function unpacked(hex, count) {
  const bits = new Uint8Array(count);
  for (let i = 0; i < count; i++) bits[i] = (parseInt(hex[i >> 2], 16) >> (3 - (i & 3))) & 1;
  return bits;
}

// ---------- shares of the steps
/** Where each stage ends, as fractions of the steps; equal where `text` is empty, null where it does not fit. */
export function bounds(text, count) {
  const written = (text ?? "").split(/[,;]/).map((part) => part.trim()).filter(Boolean);
  const shares = written.length ? written.map(Number) : new Array(count).fill(1);
  const total = shares.reduce((sum, share) => sum + share, 0);
  if (shares.length !== count || !(total > 0) || shares.some((share) => !(share >= 0))) return null;
  let sum = 0;
  return shares.map((share) => (sum += share) / total);
}

/** The input `shares` for stages that end at `ends`: whole percents, empty where all are equal. */
export function sharesText(ends) {
  const percents = ends.map((end) => Math.round(100 * end));
  const shares = percents.map((end, i) => end - (i ? percents[i - 1] : 0));
  const equal = ends.every((end, i) => Math.abs(end - (i + 1) / ends.length) < 0.006);
  return equal ? "" : shares.join(",");
}

/** The ends with stage `i` ending at `value`, between its neighbours, in steps of 5 %. */
export function moved(ends, i, value) {
  const low = i ? ends[i - 1] : 0;
  const next = [...ends];
  next[i] = Math.min(Math.max(Math.round(20 * value) / 20, low), ends[i + 1]);
  return next;
}
