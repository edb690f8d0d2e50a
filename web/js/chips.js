// Align Prompts: both prompts as chips, linked as aligned. They edit weights, windows, blend_words and keep_words.
import { el, follow, input, instead, left, linked, place, say, slide, taken, valueOf, write } from "./page.js";
import { clamp, short } from "./logic/text.js";
import { align, chosen, namesOf, weightOf, windowOf, withValue, words } from "./logic/words.js";

const NAME = "words";
const INPUTS = ["mode", "weights", "windows", "blend_words", "keep_words"];
const PIXELS = 6; // of a drag for a step of the weight
const STEP = 0.1;

export function chips(node) {
  const body = el("div", { class: "ek-words" });
  const scroll = el("div", { class: "ek-scroll" }, body);
  const note = el("div", { class: "ek-note" });
  const root = el("div", { class: "ek-column" }, scroll, note);
  instead(node, NAME, () => true);
  const chip = { node };
  const { redraw } = place(node, "editkit_words", root, {
    height: () => clamp(body.offsetHeight + 36, 64, 216),
    state: () => state(node),
    draw: (now) => draw(chip, body, note, now),
  });
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(body.offsetWidth - width) > 1) redraw();
    width = body.offsetWidth;
  }).observe(body);
}

function state(node) {
  const ran = left(node, NAME);
  const text = (name) => valueOf(node, name) ?? (linked(node, name) ? ran?.[name] : undefined);
  const now = { source: text("source_text"), target: text("target_text") };
  for (const name of INPUTS) now[name] = input(node, name)?.value ?? "";
  now.fixed = INPUTS.filter((name) => linked(node, name));
  return now;
}

function draw(chip, body, note, now) {
  const lists = { source: words(now.source), target: words(now.target) };
  const focused = document.activeElement?.dataset?.ek;
  Object.assign(chip, { now, lists, blend: chosen(now.blend_words, lists), keep: chosen(now.keep_words, lists) });
  const links = align(lists.source, lists.target, now.mode);
  chip.same = new Map();
  for (const { kind, source, target } of links) {
    if (kind !== "same") continue;
    chip.same.set(`source ${source[0]}`, `target ${target[0]}`);
    chip.same.set(`target ${target[0]}`, `source ${source[0]}`);
  }
  body.replaceChildren(...links.map((link) => group(chip, link)));
  if (focused) body.querySelector(`[data-ek="${focused}"]`)?.focus({ preventScroll: true });
  note.textContent = now.target === undefined || now.source === undefined ? say("words.linked") : links.length ? say("words.help") : say("words.empty");
  note.title = say("words.keys");
}

/** Aligned words: those of the source above those of the target, and lines between them in the colour of the kind. */
function group(chip, { kind, source, target }) {
  const row = (prompt, numbers) => el("div", { class: "ek-line" }, ...numbers.map((number) => word(chip, prompt, number)));
  const join = el("div", { class: `ek-join${source.length > 1 ? " ek-fan-up" : ""}${target.length > 1 ? " ek-fan-down" : ""}` });
  return el("div", { class: `ek-group ek-${kind}`, title: say(`words.${kind}`) }, row("source", source), join, row("target", target));
}

function word(chip, prompt, number) {
  const { now, lists } = chip;
  const key = `${prompt} ${number}`;
  const role = chip.blend.has(key) ? "blend" : chip.keep.has(key) ? "keep" : "";
  const weight = prompt === "target" ? weightOf(now.weights, lists.target, number) : 1;
  const box = el(
    "button",
    {
      type: "button",
      class: `ek-chip${role ? ` ek-${role}` : ""}`,
      "data-ek": key,
      "aria-label": `${lists[prompt][number].label}${role ? `, ${say(`words.${role}`)}` : ""}`,
      onclick: (event) => chip.moved || cycle(chip, key, role, event),
      onkeydown: (event) => keys(chip, prompt, number, weight, event),
    },
    el("span", {}, lists[prompt][number].text),
  );
  if (role) box.append(el("em", {}, say(`words.${role}.mark`)));
  if (prompt === "source") return box;
  if (weight !== 1) box.append(el("b", {}, `×${short(weight)}`));
  box.addEventListener("wheel", (event) => {
    taken(event);
    setWeight(chip, number, weight + (event.deltaY < 0 ? STEP : -STEP));
  });
  dragWeight(chip, box, number, weight);
  return el("div", { class: "ek-target" }, box, range(chip, number));
}

// ---------- edits
const edit = (chip, values) => {
  const free = Object.entries(values).filter(([name]) => !chip.now.fixed.includes(name));
  write(chip.node, Object.fromEntries(free));
};

/** A click: may change (blend), stays (keep), neither. A word that both prompts share goes in both. */
function cycle(chip, key, role, event) {
  event.stopPropagation();
  const both = [key, chip.same.get(key)].filter(Boolean);
  const blend = new Set([...chip.blend].filter((other) => !both.includes(other)));
  const keep = new Set([...chip.keep].filter((other) => !both.includes(other)));
  const next = { "": blend, blend: keep }[role];
  for (const other of next ? both : []) next.add(other);
  edit(chip, {
    blend_words: namesOf(blend, chip.lists, chip.now.blend_words),
    keep_words: namesOf(keep, chip.lists, chip.now.keep_words),
  });
}

function setWeight(chip, number, value) {
  const weight = clamp(Math.round(value * 100) / 100, -100, 100);
  edit(chip, { weights: withValue(chip.now.weights, chip.lists.target, number, weight === 1 ? null : short(weight)) });
}

function setRange(chip, number, [first, last]) {
  const whole = first <= 0 && last >= 1;
  edit(chip, { windows: withValue(chip.now.windows, chip.lists.target, number, whole ? null : `${short(first)}-${short(last)}`) });
}

function dragWeight(chip, box, number, weight) {
  let now = weight;
  box.addEventListener("pointerdown", () => (chip.moved = false));
  const move = (event, press) => {
    const steps = Math.round((event.clientX - press.clientX) / PIXELS);
    if (!steps && !chip.moved) return;
    chip.moved = true;
    now = weight + STEP * steps;
    let shown = box.querySelector("b");
    if (!shown) box.append((shown = el("b")));
    shown.textContent = `×${short(now)}`;
  };
  follow(box, move, () => chip.moved && setWeight(chip, number, now));
}

function keys(chip, prompt, number, weight, event) {
  const turn = { ArrowUp: STEP, ArrowDown: -STEP }[event.key];
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (["Enter", " "].includes(event.key)) {
    chip.moved = false;
    event.stopPropagation();
  }
  if (!turn && !by) return;
  taken(event);
  if (turn && prompt === "target") setWeight(chip, number, weight + turn);
  const next = `${prompt} ${number + (by ?? 0)}`;
  if (by) event.currentTarget.closest(".ek-words").querySelector(`[data-ek="${next}"]`)?.focus();
}

/** The range of steps in which a target word uses the source's map: a track with two handles. */
function range(chip, number) {
  const found = windowOf(chip.now.windows, chip.lists.target, number);
  const ends = [...(found ?? [0, 1])];
  const track = el("div", { class: `ek-range${found ? " ek-on" : ""}` });
  const bar = el("i");
  const show = () => {
    bar.style.left = `${100 * ends[0]}%`;
    bar.style.right = `${100 * (1 - ends[1])}%`;
    track.title = say("words.range", { first: short(ends[0]), last: short(ends[1]) });
  };
  const put = (which, value) => {
    ends[which] = which ? clamp(value, ends[0], 1) : clamp(value, 0, ends[1]);
    ends[which] = Math.round(20 * ends[which]) / 20;
    show();
  };
  for (const which of [0, 1]) {
    const label = say(which ? "words.last" : "words.first");
    const name = which ? "last" : "first";
    const values = { "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": ends[which] };
    const handle = el("s", { class: `ek-${name}`, tabindex: 0, role: "slider", "data-ek": `${name} ${number}`, ...values });
    slide(handle, track, { at: () => ends[which], put: (value) => put(which, value), end: () => setRange(chip, number, ends) });
    bar.append(handle);
  }
  track.append(bar);
  show();
  return track;
}
