// Composite over Source (Exact): a slider over source and result, and what lay outside the mask before, enlarged.
import { along, el, fileUrl, follow, instead, left, place, say } from "./page.js";
import { clamp } from "./logic/text.js";

const NAME = "compare";

export function compare(node) {
  const view = { split: 50, difference: false, index: 0 };
  const root = el("div", { class: "ek-column" });
  instead(node, NAME);
  const { redraw } = place(node, "editkit_compare", root, {
    height: () => (left(node, NAME) ? 220 : 26),
    state: () => ({ data: left(node, NAME) }),
    draw: ({ data }) => {
      if (data) view.index = clamp(view.index, 0, data.result.length - 1);
      const change = (values) => redraw(Object.assign(view, values));
      root.replaceChildren(...(data ? parts(data, view, change) : [el("div", { class: "ek-note" }, say("compare.empty"))]));
    },
  });
}

function parts(data, view, change) {
  const shown = view.difference ? [image(data.difference, view.index)] : slider(data, view);
  return [el("div", { class: "ek-stage" }, ...shown), bar(data, view, change), note(data, view)];
}

const image = (files, index, style) =>
  el("img", { src: fileUrl(files[Math.min(index, files.length - 1)]), alt: "", draggable: "false", style });

/** The source lies over the result and is cut off where the knob is; the range input makes it work by keyboard. */
function slider(data, view) {
  const over = image(data.source, view.index);
  const knob = el("div", { class: "ek-knob" });
  const range = el("input", { type: "range", class: "ek-split", min: 0, max: 100, step: 1, "aria-label": say("compare.split") });
  const show = () => {
    over.style.clipPath = `inset(0 ${100 - view.split}% 0 0)`;
    knob.style.left = `${view.split}%`;
    range.value = view.split;
  };
  range.addEventListener("input", () => {
    view.split = Number(range.value);
    show();
  });
  range.addEventListener("keydown", (event) => event.stopPropagation());
  const surface = el("div", { style: "position:absolute;inset:0" });
  const put = (event) => {
    view.split = 100 * along(surface, event);
    range.focus({ preventScroll: true });
    show();
  };
  surface.addEventListener("pointerdown", put);
  follow(surface, put);
  show();
  const tags = [
    el("span", { class: "ek-tag", style: "left:4px" }, say("compare.source")),
    el("span", { class: "ek-tag", style: "right:4px" }, say("compare.result")),
  ];
  return [image(data.result, view.index), over, ...tags, surface, range, knob];
}

function bar(data, view, change) {
  const tab = (key, difference) =>
    el(
      "button",
      {
        type: "button",
        class: `ek-button${view.difference === difference ? " ek-on" : ""}`,
        "aria-pressed": String(view.difference === difference),
        onclick: () => change({ difference }),
      },
      say(key),
    );
  const count = data.result.length;
  const turn = (by) => change({ index: (view.index + by + count) % count });
  const arrow = (key, sign, by) => el("button", { type: "button", class: "ek-button", title: say(key), onclick: () => turn(by) }, sign);
  const pages =
    count > 1
      ? [arrow("compare.previous", "‹", -1), el("span", {}, `${view.index + 1}/${count}`), arrow("compare.next", "›", 1)]
      : [];
  return el("div", { class: "ek-row" }, tab("compare.slider", false), tab("compare.difference", true), ...pages);
}

function note(data, view) {
  const undone = say("compare.undone", { undone: data.undone.toPrecision(2) });
  return el("div", { class: "ek-note" }, view.difference ? undone : data.change === 0 ? say("compare.exact") : "");
}
