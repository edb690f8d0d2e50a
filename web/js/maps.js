// Cross-Attention Maps: the map of the word under the pointer; a click adds the word to the picked mask.
import { el, fileUrl, input, instead, left, linked, place, say, write } from "./page.js";

const NAME = "maps";

export function maps(node) {
  const root = el("div", { class: "ek-column" });
  let at = 0;
  instead(node, NAME);
  place(node, "editkit_maps", root, {
    height: () => (left(node, NAME) ? 230 : 26),
    state: () => ({ data: left(node, NAME), picked: input(node, "picked")?.value ?? "" }),
    draw: ({ data, picked }) => {
      const note = el("div", { class: "ek-note" }, say(data ? "maps.help" : "maps.empty"));
      if (!data) return root.replaceChildren(note);
      const held = document.activeElement?.dataset?.ek;
      const names = picked.split(/[,\n]/).map((name) => name.trim()).filter(Boolean);
      const chosen = data.words.filter((word) => names.some((name) => name.toLowerCase() === word.toLowerCase()));
      const image = el("img", { alt: "", draggable: "false" });
      const show = (i) => {
        at = Math.min(i, data.words.length - 1);
        image.src = fileUrl(data.images[at]);
        note.textContent = say("maps.word", { word: data.words[at], peak: (100 * data.peaks[at]).toFixed(1) });
      };
      const toggle = (word) => {
        const next = chosen.includes(word) ? chosen.filter((other) => other !== word) : [...chosen, word];
        if (!linked(node, "picked")) write(node, { picked: next.join(", ") });
      };
      const chip = (word, i) =>
        el("button", {
          type: "button",
          class: `ek-chip${chosen.includes(word) ? " ek-blend" : ""}`,
          "data-ek": `map ${i}`,
          "aria-pressed": String(chosen.includes(word)),
          onpointerenter: () => show(i),
          onfocus: () => show(i),
          onkeydown: (event) => [" ", "Enter"].includes(event.key) && event.stopPropagation(),
          onclick: () => toggle(word),
        }, word);
      const stage = el("div", { class: "ek-stage", style: "cursor:default" }, image);
      root.replaceChildren(el("div", { class: "ek-words ek-same", style: "--kind:#7d8796" }, ...data.words.map(chip)), stage, note);
      if (at) show(at);
      else image.src = fileUrl(data.images[0]);
      if (held) root.querySelector(`[data-ek="${held}"]`)?.focus({ preventScroll: true });
    },
  });
}
