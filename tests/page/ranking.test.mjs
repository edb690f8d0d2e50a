import assert from "node:assert/strict";
import test from "node:test";
import { cards, columns, outline } from "../../web/js/logic/ranking.js";

test("the best comes first and has the longest bar", () => {
  const shown = cards([0.1, 0.3, 0.2], [1, 2, 0], -1);
  assert.deepEqual(shown.map((card) => card.index), [1, 2, 0]);
  assert.deepEqual(shown.map((card) => card.rank), [1, 2, 3]);
  assert.equal(shown[0].bar, 1);
  assert.ok(shown[1].bar < 1 && shown[2].bar > 0);
  assert.ok(shown.every((card) => !card.picked));
});

test("a picked image comes first and keeps its place in the ranking", () => {
  const shown = cards([0.1, 0.3, 0.2], [1, 2, 0], 0);
  assert.deepEqual(shown.map((card) => [card.index, card.rank, card.picked]), [[0, 3, true], [1, 1, false], [2, 2, false]]);
});

test("a pick that no image has changes nothing", () => {
  assert.deepEqual(cards([0.1, 0.3], [1, 0], 7).map((card) => card.index), [1, 0]);
});

test("equal scores have full bars", () => assert.deepEqual(cards([2, 2], [0, 1], -1).map((card) => card.bar), [1, 1]));

test("an outline is the border of the mask", () => {
  const mask = Uint8Array.from("00000 01110 01110 01110 00000".replaceAll(" ", ""), Number);
  assert.deepEqual([...outline(mask, 5, 5)].map((v) => v / 255).join(""), "0000001110010100111000000");
  assert.deepEqual([...outline(new Uint8Array(9).fill(1), 3, 3)].map((v) => v / 255).join(""), "111101111");
});

test("columns make images as large as possible", () => {
  assert.equal(columns(4, 200, 200), 2);
  assert.equal(columns(4, 400, 100), 4);
  assert.equal(columns(3, 100, 400), 1);
  assert.equal(columns(1, 10, 10, 32), 1);
});
