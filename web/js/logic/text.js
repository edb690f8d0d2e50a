/** `text` with every {name} replaced by values[name]. */
export const fill = (text, values = {}) => text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** A number with at most `digits` decimals, without trailing zeros. */
export const short = (value, digits = 2) => String(Number(value.toFixed(digits)));

/** Seconds as "8 s", "1:05" or "1:02:03". */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (!parts[0]) parts.shift();
  return parts.map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}
