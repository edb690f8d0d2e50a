// Nodes that learn: the loss curve while it falls, the pace, and a stop that keeps what is learned so far.
import { api } from "../../../scripts/api.js";
import { el, instead, place, say, svg } from "./page.js";
import { curve, lossText, pace } from "./logic/curve.js";

const EVENT = "editkit.learning";
const ENDS = ["executed", "execution_success", "execution_error", "execution_interrupted"];
const WIDTH = 300;
const HEIGHT = 70;

export function learning(node) {
  const view = { message: null, asked: false };
  const root = el("div", { class: "ek-column" });
  const height = () => (view.message ? 130 : 0);
  instead(node, null, () => view.message !== null);
  const mine = (id) => String(id) === String(node.id) || String(id).endsWith(`:${node.id}`);
  const { redraw } = place(node, "editkit_learning", root, {
    height,
    most: height,
    state: () => null,
    draw: () => root.replaceChildren(...(view.message ? parts(view, redraw) : [])),
    removed: () => {
      api.removeEventListener(EVENT, told);
      for (const kind of ENDS) api.removeEventListener(kind, ended);
    },
  });
  function told({ detail }) {
    if (!mine(detail.node) || !node.graph) return;
    if (!view.message) view.asked = false;
    view.message = detail;
    redraw();
  }
  function ended({ type, detail }) {
    if (!view.message || (type === "executed" && !mine(detail.node))) return;
    view.message = null;
    redraw();
  }
  api.addEventListener(EVENT, told);
  for (const kind of ENDS) api.addEventListener(kind, ended);
}

function parts(view, redraw) {
  const { message } = view;
  const { rate, left } = pace(message);
  const line = svg("polyline", { points: curve(message.losses, WIDTH, HEIGHT), fill: "none", "vector-effect": "non-scaling-stroke" });
  const chart = svg("svg", { class: "ek-chart", viewBox: `0 -3 ${WIDTH} ${HEIGHT + 6}`, preserveAspectRatio: "none" }, line);
  const stopping = view.asked || message.stopping;
  const stop = () => {
    view.asked = true;
    const body = JSON.stringify({ node: String(message.node) });
    api.fetchApi("/editkit/stop", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    redraw();
  };
  return [
    chart,
    el("div", { class: "ek-note ek-bright" }, say("learning.loss", { loss: lossText(message.last), done: message.done, total: message.total })),
    el("div", { class: "ek-note" }, say("learning.pace", { rate, left })),
    el(
      "div",
      { class: "ek-row" },
      el("button", { type: "button", class: "ek-button", disabled: stopping, onclick: stop }, say(stopping ? "learning.stopping" : "learning.stop")),
      el("button", { type: "button", class: "ek-button", onclick: () => api.interrupt() }, say("learning.cancel")),
    ),
  ];
}
