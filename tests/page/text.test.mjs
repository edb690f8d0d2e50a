import assert from "node:assert/strict";
import test from "node:test";
import { clamp, duration, fill, short } from "../../web/js/logic/text.js";

test("fill replaces names and leaves unknown ones", () => {
  assert.equal(fill("Image {pick} of {count}", { pick: 0, count: 4 }), "Image 0 of 4");
  assert.equal(fill("Image {pick}"), "Image {pick}");
});

test("durations are read at a glance", () => {
  assert.deepEqual([0, 8.4, 65, 3723, -3].map(duration), ["0 s", "8 s", "1:05", "1:02:03", "0 s"]);
});

test("numbers lose trailing zeros", () => {
  assert.deepEqual([1, 1.5, 0.333].map((value) => short(value)), ["1", "1.5", "0.33"]);
  assert.deepEqual([clamp(5, 0, 1), clamp(-1, 0, 1)], [1, 0]);
});
