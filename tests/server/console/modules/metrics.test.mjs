// Prometheus' text format, histogram quantiles, and rates over a sliding window with resets and gaps.

import assert from "node:assert/strict";
import { test } from "node:test";
import { History } from "../../../../src/sortserve/server/console/history.js";
import { parseMetrics, quantile, readingOf } from "../../../../src/sortserve/server/console/metrics.js";

const close = (found, expected) => assert.ok(Math.abs(found - expected) < 1e-9, `${found} is not ${expected}`);

test("samples, labels, escapes and special numbers are read; other lines are not", () => {
  const text = [
    "# HELP a_total Of things",
    "# TYPE a_total counter",
    'a_total{model="m\\"x\\\\y\\nz",le="+Inf"} 3.0 1700000000000',
    "plain 1e-3",
    'two{a="1,2}",b="{"} +Inf',
    "broken{",
    "",
  ].join("\n");
  const samples = parseMetrics(text);
  assert.deepEqual(samples.get("a_total"), [{ labels: { model: 'm"x\\y\nz', le: "+Inf" }, value: 3 }]);
  assert.equal(samples.get("plain")[0].value, 0.001);
  assert.deepEqual(samples.get("two")[0], { labels: { a: "1,2}", b: "{" }, value: Infinity });
  assert.equal(samples.size, 3);
});

test("a reading sums over all labels but one", () => {
  const reading = readingOf(
    parseMetrics(`sortserve_requests_total{model="m",submodel="d4",status="200"} 3
sortserve_requests_total{model="m",submodel="d4",status="499"} 2
sortserve_requests_total{model="m",submodel="none",status="429"} 1
sortserve_time_to_first_token_seconds_bucket{le="0.1",model="m",submodel="d2"} 4
sortserve_time_to_first_token_seconds_bucket{le="0.1",model="m",submodel="d4"} 5
sortserve_quality_ratio_sum{model="m",outcome="met"} 1.8
sortserve_quality_ratio_count{model="m",outcome="met"} 2.0
sortserve_goodput_total{model="m",submodel="d4"} 1.8
sortserve_submodel_switches_total{direction="up",model="m"} 7
sortserve_submodel_switches_total{direction="down",model="m"} 8
sortserve_requests_running{model="m"} 2.0
sortserve_kv_cache_usage_ratio{model="m"} 0.25
sortserve_model_ready{model="m"} 1.0
sortserve_build_info{python="3.11",version="0.1.0"} 1.0`),
    5,
  );
  assert.deepEqual([...reading.counters.requests], [["d4", 5], ["none", 1]]);
  assert.deepEqual([...reading.counters.ttft], [["0.1", 9]]);
  const { quality, answers, goodput } = reading.counters;
  assert.deepEqual([[...quality], [...answers], [...goodput]], [[["met", 1.8]], [["met", 2]], [["d4", 1.8]]]);
  assert.equal(reading.counters.events.get("switches"), 15);
  assert.deepEqual([reading.running, reading.waiting, reading.kv], [2, 0, 0.25]);
  assert.deepEqual([reading.ready, reading.model, reading.version], [true, "m", "0.1.0"]);
});

test("an empty exposition is a reading of zeros that is not ready", () => {
  const reading = readingOf(parseMetrics(""), 0);
  assert.deepEqual([reading.ready, reading.running, reading.model], [false, 0, ""]);
});

test("quantiles are interpolated within their bucket", () => {
  const buckets = [[0.1, 10], [0.2, 30], [0.5, 40], [Infinity, 40]];
  close(quantile(buckets, 0.5), 0.15); // rank 20: half way through the 20 observations in (0.1, 0.2]
  close(quantile(buckets, 0.25), 0.1);
  close(quantile(buckets, 0.95), 0.44); // rank 38: 8 of 10 through (0.2, 0.5]
  close(quantile(buckets.toReversed(), 0.125), 0.05);
});

test("quantiles of nothing, and beyond the last bound", () => {
  assert.equal(quantile([], 0.5), null);
  assert.equal(quantile([[0.1, 0], [Infinity, 0]], 0.5), null);
  close(quantile([[0.1, 1], [0.2, 1], [Infinity, 10]], 0.95), 0.2);
  close(quantile([[0.1, 0], [0.2, 0], [0.5, 4], [Infinity, 4]], 0.5), 0.35); // empty buckets are passed over
});

/** A reading with these counters. */
function reading(counters) {
  const maps = Object.fromEntries(Object.entries(counters).map(([kind, values]) => [kind, new Map(Object.entries(values))]));
  return { counters: maps, running: 1, waiting: 2, kv: 0.5 };
}

/** A history of (seconds, counters or null). */
function historyOf(window, moments) {
  const history = new History(600, window);
  for (const [seconds, counters] of moments) history.add(counters && reading(counters), seconds);
  return history;
}

test("rates are of the window only", () => {
  const history = historyOf(2, [0, 1, 2, 3, 4].map((second) => [second, { tokens: { d4: second < 3 ? 0 : (second - 2) * 10, d2: 100 } }]));
  assert.equal(history.points[0].tokens, null); // one scrape alone has no rate
  assert.deepEqual(history.points[4].tokens, { d4: 10, d2: 0 });
  history.setWindow(4);
  assert.deepEqual(history.points[4].tokens, { d4: 5, d2: 0 });
});

test("a counter that starts anew counts from zero, never backwards", () => {
  const history = historyOf(10, [
    [0, { tokens: { d4: 1000 } }],
    [1, { tokens: { d4: 1010 } }],
    [2, { tokens: { d4: 6 } }],
    [4, { tokens: { d4: 16 } }],
  ]);
  assert.deepEqual(history.points[3].tokens, { d4: (10 + 6 + 10) / 4 });
});

test("a gap shows as one, and the counters go on after it", () => {
  const history = historyOf(10, [[0, { tokens: { d4: 5 } }], [1, null], [2, { tokens: { d4: 9 } }]]);
  assert.deepEqual([history.points[1].tokens, history.points[1].running, history.points[1].kv], [null, null, null]);
  assert.deepEqual(history.points[2].tokens, { d4: 2 });
});

test("after a pause longer than the window there is no rate at first", () => {
  const history = historyOf(10, [[0, { tokens: { d4: 0 } }], [100, { tokens: { d4: 900 } }], [101, { tokens: { d4: 903 } }]]);
  assert.equal(history.points[1].tokens, null);
  assert.deepEqual(history.points[2].tokens, { d4: 3 });
});

test("a name that appears later counts from zero", () => {
  const history = historyOf(10, [[0, { requests: { d4: 1 } }], [2, { requests: { d4: 1, d2: 4 } }]]);
  assert.deepEqual(history.points[1].requests, { d4: 0, d2: 2 });
});

test("attainment counts refused as not met, and is unknown without budgets", () => {
  const none = { met: 4, missed: 0, refused: 0 };
  const history = historyOf(10, [[0, { budgets: none }], [1, { budgets: none }], [2, { budgets: { met: 6, missed: 1, refused: 1 } }]]);
  assert.equal(history.points[1].attainment, null);
  assert.equal(history.points[2].attainment, 0.5);
  assert.equal(history.points[2].budgets, 4);
});

test("quality is of answers with a budget, goodput of those that met it, per second", () => {
  const before = { quality: { met: 3, "no-budget": 50 }, answers: { met: 4, "no-budget": 50 }, goodput: { d8: 3 } };
  const after = {
    quality: { met: 4.5, missed: 0.9, "no-budget": 60 },
    answers: { met: 6, missed: 1, "no-budget": 60 },
    goodput: { d8: 3.7, d4: 0.8 },
  };
  const history = historyOf(10, [[0, before], [2, after], [4, after]]);
  close(history.points[1].quality, 0.8);
  close(history.points[1].goodput, 0.75);
  close(history.points[2].goodput, 0.375);
  history.setWindow(1);
  assert.equal(history.points[2].quality, null); // no answer in this second
});

test("percentiles are of the window, in milliseconds", () => {
  const old = { 0.1: 100, 1: 100, "+Inf": 100 };
  const history = historyOf(10, [[0, { ttft: old }], [1, { ttft: { 0.1: 100, 1: 110, "+Inf": 110 } }]]);
  close(history.points[1].ttft.p50, 550);
  close(history.points[1].ttft.p95, 955);
  assert.equal(history.points[1].tpot.p50, null);
});

test("what is older than the span is dropped", () => {
  const history = new History(60, 10);
  for (let second = 0; second < 200; second++) history.add(reading({ tokens: { d4: second } }), second);
  assert.equal(history.points.length, 61);
  assert.equal(history.points[0].seconds, 139);
  assert.deepEqual(history.points[60].tokens, { d4: 1 });
});
