// Budgets: predictions, the slider's scale, what is feasible.

import assert from "node:assert/strict";
import { test } from "node:test";
import * as budget from "../../../../src/sortserve/server/console/budget.js";

const entry = (id, ttft, tpot, degraded = false) => ({ id, predicted_ttft_ms: ttft, predicted_tpot_ms: tpot, degraded });
const LADDER = [entry("d1", 5, 1, true), entry("d2", 10, 2), entry("d4", 20, 4), entry("d8", 40, 8)];

test("an answer takes its first token and then one per token after it", () => {
  assert.equal(budget.answerMs(LADDER[1], 64), 10 + 63 * 2);
  assert.equal(budget.answerMs(LADDER[1], 1), 10);
  assert.equal(budget.answerMs(entry("d2", null, null), 64), null);
  assert.equal(budget.answerMs(null, 64), null);
});

test("the smallest that may answer: pinned, else the floor, else the first that is not degraded", () => {
  assert.equal(budget.floorOf(LADDER, null, "").id, "d2");
  assert.equal(budget.floorOf(LADDER, null, "d4").id, "d4");
  assert.equal(budget.floorOf(LADDER, null, "d1").id, "d1");
  assert.equal(budget.floorOf(LADDER, "d8", "d4").id, "d8");
  assert.equal(budget.floorOf([], null, ""), null);
});

test("the slider's ends lie around what is predicted, within what the server takes", () => {
  for (const [feasible, full] of [[136, 544], [0.4, 0.9], [40_000, 3_000_000], [null, null]]) {
    const [low, high] = budget.rangeOf(feasible, full);
    assert.ok(low > 0 && high <= 3_600_000 && low < high, `${low} to ${high}`);
    if (feasible !== null) assert.ok(low < feasible && (high > full || high === 3_600_000), `${low} to ${high}`);
  }
});

test("positions and budgets are each other's inverse, in equal ratios", () => {
  const range = [10, 10_000];
  assert.equal(budget.fromPosition(0, range), 10);
  assert.equal(budget.fromPosition(budget.STEPS, range), 10_000);
  assert.equal(budget.fromPosition(budget.STEPS / 2, range), 316);
  for (let position = 0; position <= budget.STEPS + 1; position++) {
    assert.equal(budget.toPosition(budget.fromPosition(position, range), range), position);
  }
});

test("no budget is the slider's end, and what is off the scale stands at an end", () => {
  const range = [10, 10_000];
  assert.equal(budget.fromPosition(budget.STEPS + 1, range), null);
  assert.equal(budget.toPosition(null, range), budget.STEPS + 1);
  assert.equal(budget.toPosition(1, range), 0);
  assert.equal(budget.toPosition(1e6, range), budget.STEPS);
});

test("three budgets are feasible and rise", () => {
  const [tight, middle, ample] = budget.threeBudgets(136, 544);
  assert.ok(136 < tight && tight < middle && middle < ample && ample > 544);
  assert.equal(budget.threeBudgets(null, null).length, 3);
});

test("a typed budget", () => {
  assert.equal(budget.parseBudget(" 250 "), 250);
  assert.equal(budget.parseBudget("0.5"), 0.5);
  assert.equal(budget.parseBudget(""), null);
  for (const text of ["0", "-3", "soon", "3600001", "NaN", "Infinity"]) assert.equal(budget.parseBudget(text), undefined, text);
});
