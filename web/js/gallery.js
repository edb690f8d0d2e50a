// CLIP Rank: every candidate with its score, best first. A click pins one as the winner (the input `pick`).
import { el, fileUrl, input, instead, left, linked, pixels, place, say, taken, write } from "./page.js";
import { cards, columns, outline } from "./logic/ranking.js";

const NAME = "ranking";
const CAPTION = 32; // height of bar and score below an image

export function gallery(node) {
  const list = el("div", { class: "ek-cards", role: "listbox", "aria-label": say("gallery.label") });
  const note = el("div", { class: "ek-note" });
  const root = el("div", { class: "ek-column" }, list, note);
  new ResizeObserver(() => arrange(list)).observe(list);
  instead(node, NAME);
  place(node, "editkit_gallery", root, {
    height: () => (left(node, NAME) ? 220 : 26),
    state: () => ({ ranking: left(node, NAME), pick: input(node, "pick")?.value ?? -1, fixed: linked(node, "pick") }),
    draw: ({ ranking, pick, fixed }) => draw(node, list, note, ranking, pick, fixed),
  });
}

function draw(node, list, note, ranking, pick, fixed) {
  if (!ranking) {
    list.replaceChildren();
    note.textContent = say("gallery.empty");
    return;
  }
  const focused = list.contains(document.activeElement) ? Number(document.activeElement.dataset.index) : null;
  const shown = cards(ranking.scores, ranking.order, pick);
  list.replaceChildren(...shown.map((card) => tile(node, ranking, card, pick, fixed)));
  arrange(list);
  if (focused !== null) list.querySelector(`[data-index="${focused}"]`)?.focus();
  note.textContent = said(ranking, pick, fixed);
}

/** As many columns as give the largest images. */
function arrange(list) {
  const { clientWidth: width, clientHeight: height, childElementCount: count } = list;
  if (!count || !width) return;
  const least = Math.max(1, Math.ceil(width / 170));
  const most = Math.max(1, Math.floor(width / 76));
  list.style.setProperty("--ek-columns", Math.min(Math.max(columns(count, width, height, CAPTION), least), most));
}

function said(ranking, pick, fixed) {
  if (fixed) return say("gallery.linked");
  if (pick >= ranking.scores.length) return say("gallery.missing", { pick, count: ranking.scores.length });
  if (pick !== ranking.pick) return say("gallery.again");
  return pick >= 0 ? say("gallery.picked", { pick }) : say("gallery.best");
}

function tile(node, ranking, card, pick, fixed) {
  const image = el("img", { src: fileUrl(ranking.images[card.index]), draggable: "false", alt: "" });
  const frame = el("div", { class: "ek-frame" }, image);
  const mask = ranking.masks[ranking.masks.length > 1 ? card.index : 0];
  if (mask) drawOutline(frame, fileUrl(mask));
  const choose = () => fixed || write(node, { pick: card.picked ? -1 : card.index });
  return el(
    "button",
    {
      class: `ek-card${card.picked ? " ek-on" : ""}`,
      type: "button",
      role: "option",
      "aria-selected": String(card.picked),
      "data-index": card.index,
      title: say("gallery.tile", { rank: card.rank, index: card.index, score: card.score.toFixed(4) }),
      disabled: fixed,
      onclick: choose,
      onkeydown: (event) => step(event, node),
    },
    frame,
    el("div", { class: "ek-bar" }, el("i", { style: `width:${(100 * card.bar).toFixed(1)}%` })),
    el("div", { class: "ek-score" }, el("span", {}, `#${card.rank}`), el("b", {}, card.score.toFixed(3))),
  );
}

/** Arrow keys walk from one candidate to the next; Enter and space click it. */
function step(event, node) {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (["Enter", " "].includes(event.key)) event.stopPropagation();
  if (!by) return;
  taken(event);
  const next = by > 0 ? event.currentTarget.nextElementSibling : event.currentTarget.previousElementSibling;
  next?.focus();
}

async function drawOutline(frame, url) {
  const data = await pixels(url);
  const inside = new Uint8Array(data.width * data.height);
  for (let i = 0; i < inside.length; i++) inside[i] = data.data[4 * i] > 127 ? 1 : 0;
  const edge = outline(inside, data.width, data.height);
  const canvas = el("canvas", { class: "ek-outline" });
  canvas.width = data.width;
  canvas.height = data.height;
  const drawn = new ImageData(data.width, data.height);
  for (let i = 0; i < edge.length; i++) drawn.data.set([255, 214, 90, edge[i]], 4 * i);
  canvas.getContext("2d").putImageData(drawn, 0, 0);
  frame.append(canvas);
}
