import assert from "node:assert/strict";
import test from "node:test";
import { bounds, dilate, downsample, moved, parseKernels, scaledKernel, sharesText, stages, unpacked } from "../../web/js/logic/masks.js";

const grid = (text) => Uint8Array.from(text.replaceAll(/\s/g, ""), Number);
const text = (mask) => [...mask].join("");

test("kernels are read as the node reads them", () => {
  assert.deepEqual(parseKernels("7, 5;3,1"), [7, 5, 3, 1]);
  assert.deepEqual(parseKernels("1"), [1]);
  for (const wrong of ["", "7,5,a", "4,1", "3,5,1", "3", undefined]) assert.equal(parseKernels(wrong), null);
});

test("kernels scale with the shorter side", () => {
  assert.deepEqual([7, 5, 3, 1].map((kernel) => scaledKernel(kernel, 64)), [13, 9, 5, 1]);
  assert.deepEqual([3, 3].map((kernel, i) => scaledKernel(kernel, [12, 80][i])), [3, 5]);
});

test("a dilation grows by its radius and stops at the frame", () => {
  const mask = grid("00000 00100 00000");
  assert.equal(text(dilate(mask, 5, 3, 3)), text(grid("01110 01110 01110")));
  assert.equal(text(dilate(mask, 5, 3, 5)), text(grid("11111 11111 11111")));
  assert.equal(text(dilate(mask, 5, 3, 1)), text(mask));
});

test("the last stage is the mask, inverted before or after the dilation", () => {
  const mask = grid("000 010 000");
  assert.equal(text(stages(mask, 3, 3, [3, 1]).at(-1)), text(mask));
  assert.equal(text(stages(mask, 3, 3, [3, 1], { invert: true })[0]), "111111111");
  assert.equal(text(stages(mask, 3, 3, [3, 1], { invert: true, published: true })[0]), "000000000");
});

test("a latent pixel is marked by the largest value, the mean or the centre", () => {
  const values = Float32Array.from(grid("1000 0000 0000 0000"));
  assert.equal(text(downsample(values, 4, 4, 2, 2, "max", 0.5)), "1000");
  assert.equal(text(downsample(values, 4, 4, 2, 2, "area", 0.5)), "0000");
  assert.equal(text(downsample(values, 4, 4, 2, 2, "area", 0.25)), "1000");
  assert.equal(text(downsample(values, 4, 4, 2, 2, "nearest", 0.5)), "0000");
});

test("bits are unpacked first bit first", () => assert.equal(text(unpacked("a7", 7)), "1010011"));

test("shares become ends and ends shares", () => {
  assert.deepEqual(bounds("", 4), [0.25, 0.5, 0.75, 1]);
  assert.deepEqual(bounds("2, 1,1", 3), [0.5, 0.75, 1]);
  for (const wrong of [["1,1", 3], ["0,0", 2], ["-1,2", 2], ["a,1", 2]]) assert.equal(bounds(...wrong), null);
  assert.equal(sharesText([0.25, 0.5, 0.75, 1]), "");
  assert.equal(sharesText([1 / 3, 2 / 3, 1]), "");
  assert.equal(sharesText([0.4, 0.6, 0.8, 1]), "40,20,20,20");
  assert.deepEqual(moved([0.25, 0.5, 1], 0, 0.41), [0.4, 0.5, 1]);
  assert.deepEqual(moved([0.25, 0.5, 1], 0, 0.9), [0.5, 0.5, 1]);
  assert.deepEqual(moved([0.25, 0.5, 1], 1, -1), [0.25, 0.25, 1]);
});
