import assert from "node:assert/strict";
import test from "node:test";
import { align, chosen, named, namesOf, weightOf, windowOf, withValue, words } from "../../web/js/logic/words.js";

const labels = (text) => words(text).map((word) => word.label);
const lists = { source: words("a red cat and a dog"), target: words("a blue cat and a big dog") };

test("words are found as the node finds them", () => {
  assert.deepEqual(labels("A dog, the DOG's well-known (red:1.3) hat."), ["A", "dog", "the", "DOG's", "well-known", "red", "hat"]);
  assert.deepEqual(labels("red and Red"), ["red#1", "and", "Red#2"]);
  assert.deepEqual(labels("café 🎉🎉 naïve—yes"), ["café", "🎉🎉", "naïve", "yes"]);
  assert.deepEqual(labels(""), []);
});

test("equal words are linked and the words between them replaced, added and removed", () => {
  const kinds = (source, target, mode) => align(words(source), words(target), mode).map((link) => link.kind).join(" ");
  assert.equal(kinds("a red cat", "a blue cat"), "same replaced same");
  assert.equal(kinds("a cat", "a big cat"), "same added same");
  assert.equal(kinds("a big cat", "a cat"), "same removed same");
  assert.equal(kinds("a red cat", "a blue cat", "refine"), "same removed added same");
  assert.equal(kinds("one two", "two one", "replace"), "replaced replaced");
  assert.deepEqual(align(words("a red cat"), words("a very dark cat"))[1], { kind: "replaced", source: [1], target: [1, 2] });
  assert.deepEqual(align([], []), []);
});

test("entries name words as in the node's own syntax", () => {
  const list = words("a red cat and a red dog");
  assert.deepEqual(named("red", list, "target"), [1, 5]);
  assert.deepEqual(named("RED#2", list, "target"), [5]);
  assert.deepEqual(named("red dog", list, "target"), [5, 6]);
  assert.deepEqual(named("source:red", list, "target"), []);
  assert.deepEqual(named("target: red#1", list, "target"), [1]);
});

test("names are written as short as they stay clear", () => {
  assert.deepEqual([...chosen("cat, target:dog", lists)], ["source 2", "target 2", "target 6"]);
  assert.equal(namesOf(["source 2", "target 2"], lists), "cat");
  assert.equal(namesOf(["source 2"], lists), "source:cat");
  assert.equal(namesOf(["target 1"], lists, "blue, bird"), "blue, bird");
  assert.equal(namesOf([], lists, "cat"), "");
  for (const text of ["cat, target:dog", "a#2", "big dog", "source:red, blue"]) {
    assert.deepEqual([...chosen(namesOf(chosen(text, lists), lists), lists)].sort(), [...chosen(text, lists)].sort());
  }
});

test("weights and step ranges are read and written", () => {
  const list = words("a red cat and a red dog");
  assert.equal(weightOf("cat: 2, red#2: -.5", list, 2), 2);
  assert.equal(weightOf("cat: 2, red#2: -.5", list, 5), -0.5);
  assert.equal(weightOf("cat: 2", list, 0), 1);
  assert.deepEqual(windowOf("red: 0.2-0.4, cat: 0.5", list, 1), [0.2, 0.4]);
  assert.deepEqual(windowOf("red: 0.2-0.4, cat: 0.5", list, 2), [0, 0.5]);
  assert.equal(windowOf("cat: 0.5", list, 1), null);
  assert.equal(withValue("cat: 2", list, 2, null), "");
  assert.equal(withValue("cat: 2", list, 2, "3"), "cat: 3");
  assert.equal(withValue("red: 2", list, 1, "3"), "red#2: 2, red#1: 3");
  assert.equal(withValue("", list, 6, "0-0.4"), "dog: 0-0.4");
});
