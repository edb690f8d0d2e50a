import { duration, short } from "./text.js";

/** Points "x,y" of a loss curve in a box; logarithmic where the losses fall by more than a factor of ten. */
export function curve(losses, width, height) {
  const finite = losses.filter(Number.isFinite);
  if (!finite.length) return "";
  const log = Math.min(...finite) > 0 && Math.max(...finite) / Math.min(...finite) > 10;
  const value = log ? Math.log10 : (loss) => loss;
  const [low, high] = [Math.min(...finite), Math.max(...finite)].map(value);
  return losses
    .map((loss, i) => [i, loss])
    .filter(([, loss]) => Number.isFinite(loss))
    .map(([i, loss]) => {
      const x = losses.length > 1 ? (i / (losses.length - 1)) * width : 0;
      const y = high > low ? height * (1 - (value(loss) - low) / (high - low)) : height / 2;
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    })
    .join(" ");
}

/** Iterations per second (or seconds per iteration below one) and the time left, for {done, total, seconds}. */
export function pace({ done, total, seconds }) {
  if (!(done > 0) || !(seconds > 0)) return { rate: "", left: "" };
  const rate = done / seconds;
  const shown = rate >= 1 ? `${short(rate, rate < 10 ? 1 : 0)} it/s` : `${short(1 / rate, 1)} s/it`;
  return { rate: shown, left: duration((total - done) / rate) };
}

/** A loss with three digits that count. */
export const lossText = (loss) => (Math.abs(loss) >= 1e-3 && Math.abs(loss) < 1e4 ? Number(loss.toPrecision(3)).toString() : loss.toExponential(1));
