// The words of two prompts, their alignment, and the syntax of the word inputs (pipelines/attention/prompts/).

const LETTER = /[\p{L}\p{N}]/u;
const MARK = /[\p{M}\p{Cf}]/u;
const SIGN = /\p{S}/u;

/** Normalised form by which words are compared: NFKC, without case, with plain apostrophes. */
export const wordName = (text) => text.normalize("NFKC").toLowerCase().replaceAll("’", "'");

/** The words of a text: {text, name, label}; a repeated word has a label with its number, as in red#2. */
export function words(text) {
  const found = [];
  let last = "";
  let open = false;
  const chars = [...(text ?? "").replace(/:\s*[\d.]+\s*\)/g, ")")]; // a host's weights, (red:1.2), are no words
  chars.forEach((char, at) => {
    let kind = "";
    if (LETTER.test(char)) kind = "L";
    else if (MARK.test(char)) kind = open ? last : "";
    else if (SIGN.test(char) && char.codePointAt(0) > 127) kind = "S";
    else if ("-'’".includes(char) && open && last === "L" && LETTER.test(chars[at + 1] ?? " ")) kind = "L";
    if (kind && open && kind === last) found[found.length - 1] += char;
    else if (kind) found.push(char);
    open = kind !== "";
    last = kind;
  });
  const names = found.map(wordName);
  return found.map((written, i) => {
    const same = names.filter((name) => name === names[i]).length;
    const number = names.slice(0, i + 1).filter((name) => name === names[i]).length;
    return { text: written, name: names[i], label: same > 1 ? `${written}#${number}` : written };
  });
}

/** For each word of the target the equal word of the source, or -1 (Needleman-Wunsch; gaps are free). */
function matched(source, target) {
  const score = [new Array(target.length + 1).fill(0)];
  source.forEach((item, i) => {
    const row = [0];
    target.forEach((other, j) => row.push(Math.max(score[i][j + 1], row[j], score[i][j] + (item === other ? 1 : 0))));
    score.push(row);
  });
  const pairs = new Array(target.length).fill(-1);
  let i = source.length;
  let j = target.length;
  while (i && j) {
    if (score[i][j] === score[i][j - 1]) j--;
    else if (score[i][j] === score[i - 1][j]) i--;
    else pairs[--j] = --i;
  }
  return pairs;
}

/**
 * Links between the words of two prompts as mode "auto" aligns them: {kind, source: [..], target: [..]} in order, where
 * kind is same, replaced, added or removed. Mode "refine" adds and removes instead of replacing.
 */
export function align(source, target, mode = "auto") {
  if (mode === "replace" && source.length === target.length) return source.map((word, i) => pair(source, target, i, i));
  const pairs = matched(source.map((word) => word.name), target.map((word) => word.name));
  const links = [];
  let i = 0;
  let j = 0;
  for (let end = 0; end <= target.length; end++) {
    const partner = end === target.length ? source.length : pairs[end];
    if (partner < 0) continue;
    links.push(...stretch(source, target, range(i, partner), range(j, end), mode));
    if (end < target.length) links.push(pair(source, target, partner, end));
    i = partner + 1;
    j = end + 1;
  }
  return links;
}

const range = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);

const pair = (source, target, i, j) => ({
  kind: source[i].name === target[j].name ? "same" : "replaced",
  source: [i],
  target: [j],
});

function stretch(source, target, before, after, mode) {
  if (before.length && after.length && mode !== "refine") {
    if (before.length === after.length) return before.map((i, n) => pair(source, target, i, after[n]));
    return [{ kind: "replaced", source: before, target: after }];
  }
  return [
    ...before.map((i) => ({ kind: "removed", source: [i], target: [] })),
    ...after.map((j) => ({ kind: "added", source: [], target: [j] })),
  ];
}

// ---------- syntax of the inputs
const entries = (text) => (text ?? "").split(/[,\n]/).map((entry) => entry.trim()).filter(Boolean);

/** Which words of a prompt an entry such as red, red#2, red circle, source:red names: their numbers. */
export function named(entry, list, prompt) {
  const colon = entry.indexOf(":");
  if (colon >= 0 && entry.slice(0, colon).trim().toLowerCase() !== prompt) return [];
  const [, written, number] = entry.slice(colon + 1).match(/^(.*?)(?:#(\d{1,6}))?\s*$/s);
  const names = words(written).map((word) => word.name);
  const found = [];
  for (let i = 0; names.length && i + names.length <= list.length; i++) {
    if (names.every((name, k) => list[i + k].name === name)) found.push(range(i, i + names.length));
  }
  return (number ? found.slice(number - 1, number) : found).flat();
}

/** The words that an input such as blend_words names, as keys "source 3" and "target 0". */
export function chosen(text, lists) {
  const keys = (prompt, entry) => named(entry, lists[prompt], prompt).map((number) => `${prompt} ${number}`);
  return new Set(entries(text).flatMap((entry) => [...keys("source", entry), ...keys("target", entry)]));
}

/** The text of an input that names the words of `keys`; entries of `text` that name no word are kept. */
export function namesOf(keys, lists, text = "") {
  const unknown = entries(text).filter((entry) => !chosen(entry, lists).size);
  const left = new Set(keys);
  const found = [];
  for (const key of keys) {
    if (!left.has(key)) continue;
    const [prompt, number] = key.split(" ");
    const { label } = lists[prompt][number];
    const plain = [...chosen(label, lists)];
    const written = plain.every((other) => left.has(other)) ? label : `${prompt}:${label}`;
    for (const other of chosen(written, lists)) left.delete(other);
    found.push(written);
  }
  return [...found, ...unknown].join(", ");
}

const NUMBER = String.raw`[+-]?(?:\d+\.?\d*|\.\d+)`;
const WEIGHT = new RegExp(`^(.*):\\s*(${NUMBER})$`, "s");
const WINDOW = new RegExp(`^(.*):\\s*(?:(${NUMBER})\\s*[-–]\\s*)?(${NUMBER})$`, "s");

/** The weight of a target word, 1 where the input names none. */
export function weightOf(text, list, number) {
  const found = entries(text).map((entry) => entry.match(WEIGHT)).find((m) => m && named(m[1].trim(), list, "target").includes(number));
  return found ? Number(found[2]) : 1;
}

/** The step range [first, last] of a target word, or null where the input names none. */
export function windowOf(text, list, number) {
  const found = entries(text).map((entry) => entry.match(WINDOW)).find((m) => m && named(m[1].trim(), list, "target").includes(number));
  return found ? [Number(found[2] ?? 0), Number(found[3])] : null;
}

/** An input of pairs with another value for one word; null removes it. Other words of the same entry keep theirs. */
export function withValue(text, list, number, value) {
  const kept = entries(text).flatMap((entry) => {
    const colon = entry.lastIndexOf(":");
    const numbers = colon < 0 ? [] : named(entry.slice(0, colon).trim(), list, "target");
    if (!numbers.includes(number)) return [entry];
    return numbers.filter((other) => other !== number).map((other) => `${list[other].label}:${entry.slice(colon + 1)}`);
  });
  return (value === null ? kept : [...kept, `${list[number].label}: ${value}`]).join(", ");
}
