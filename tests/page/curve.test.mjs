import assert from "node:assert/strict";
import test from "node:test";
import { curve, lossText, pace } from "../../web/js/logic/curve.js";

test("a curve spans its box, low losses at the bottom", () => {
  assert.equal(curve([4, 2, 3], 100, 50), "0.0,0.0 50.0,50.0 100.0,25.0");
  assert.equal(curve([100, 10, 1], 100, 50), "0.0,0.0 50.0,25.0 100.0,50.0"); // logarithmic
  assert.equal(curve([5], 100, 50), "0.0,25.0");
  assert.equal(curve([], 100, 50), "");
  assert.equal(curve([2, NaN, 1], 100, 50), "0.0,0.0 100.0,50.0");
});

test("pace is read at a glance", () => {
  assert.deepEqual(pace({ done: 50, total: 75, seconds: 10 }), { rate: "5 it/s", left: "5 s" });
  assert.deepEqual(pace({ done: 2, total: 50, seconds: 5 }), { rate: "2.5 s/it", left: "2:00" });
  assert.deepEqual(pace({ done: 0, total: 75, seconds: 0 }), { rate: "", left: "" });
});

test("losses keep three digits", () => {
  assert.deepEqual([0.012345, 12.3456, 1e-7, 0].map(lossText), ["0.0123", "12.3", "1.0e-7", "0.0e+0"]);
});
