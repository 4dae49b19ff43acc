// Event streams, errors, tints and how numbers are written.

import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { Api, ApiError } from "../../../../src/sortserve/server/console/api.js";
import * as format from "../../../../src/sortserve/server/console/format.js";
import { serverSentEvents } from "../../../../src/sortserve/server/console/sse.js";
import { submodelOf, tinted, tints } from "../../../../src/sortserve/server/console/tint.js";

const realFetch = globalThis.fetch;
afterEach(() => {
  globalThis.fetch = realFetch;
});

/** A byte stream of `text` in packets of `size` bytes. */
function stream(text, size) {
  const bytes = new TextEncoder().encode(text);
  return new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    },
  });
}

async function all(iterable) {
  const found = [];
  for await (const one of iterable) found.push(one);
  return found;
}

test("events survive any way of cutting the bytes, characters included", async () => {
  const text = 'data: {"a": "é🙂"}\n\n: a comment\n\ndata: two\r\n\r\nevent: x\ndata:three\ndata: lines\n\ndata: [DONE]\n\n';
  for (const size of [1, 2, 3, 7, 1000]) {
    assert.deepEqual(await all(serverSentEvents(stream(text, size))), ['{"a": "é🙂"}', "two", "three\nlines", "[DONE]"]);
  }
});

function answer(body, status = 200, headers = {}) {
  globalThis.fetch = async (path, options) => {
    globalThis.asked = { path, options };
    return new Response(body, { status, headers });
  };
}

test("an answer is its chunks, asked with the key", async () => {
  answer(stream('data: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n', 5));
  const { chunks } = await new Api("secret").generate("v1/completions", { prompt: "x" }, { "X-Submodel": "d2" });
  assert.deepEqual(await all(chunks), [{ n: 1 }, { n: 2 }]);
  assert.equal(asked.options.headers.Authorization, "Bearer secret");
  assert.equal(asked.options.headers["X-Submodel"], "d2");
  await new Api("").json("x").catch(() => {});
  assert.equal("Authorization" in asked.options.headers, false);
});

test("errors: of a refusal, inside a stream, of a stream that breaks off, of another program", async () => {
  answer('{"error": {"message": "no", "type": "t", "param": "p", "code": "overloaded"}}', 429, { "Retry-After": "2" });
  await assert.rejects(new Api("").json("x"), (error) => error instanceof ApiError && error.code === "overloaded" && error.retryAfter === 2 && error.param === "p");
  const failing = async (text) => {
    answer(stream(text, 9));
    await all((await new Api("").generate("x", {}, {})).chunks);
  };
  await assert.rejects(failing('data: {"n": 1}\n\ndata: {"error": {"message": "died", "code": "engine_failed"}}\n\n'), { code: "engine_failed", message: "died" });
  await assert.rejects(failing('data: {"n": 1}\n\n'), { code: "incomplete" });
  answer("<html>", 502);
  await assert.rejects(new Api("").json("x"), { status: 502, code: "http_error" });
  globalThis.fetch = async () => {
    throw new TypeError("fetch failed");
  };
  await assert.rejects(new Api("").json("x"), { status: 0, code: "unreachable" });
});

test("a chunk's fingerprint names its sub-model", () => {
  assert.equal(submodelOf("sortserve-0.1.0-d8"), "d8");
  assert.equal(submodelOf("sortserve-0.1.0.dev3+g12-d24-w100-s1"), "d24-w100-s1");
  assert.equal(submodelOf("fp_123"), null);
  assert.equal(submodelOf(undefined), null);
});

test("neighbours on the ladder differ in hue and in line", () => {
  const ids = Array.from({ length: 12 }, (_, place) => `d${place}`);
  const looks = ids.map((id) => tints(ids).of(id));
  for (let place = 1; place < ids.length; place++) {
    assert.notEqual(looks[place].hue, looks[place - 1].hue);
    assert.notEqual(looks[place].pattern, looks[place - 1].pattern);
  }
  assert.equal(tints(ids).of("stranger").known, false);
  assert.match(tinted(looks[0], "token").class, /^token tinted underline-/);
  assert.equal(tints(["only"]).of("only").known, true);
});

test("durations, counts, shares, sizes", () => {
  assert.deepEqual([0, 4.21, 9.96, 312.4, 1240, 12_345].map(format.duration), ["0.0 ms", "4.2 ms", "10 ms", "312 ms", "1.24 s", "12.3 s"]);
  assert.deepEqual([null, undefined, NaN].map(format.duration), ["–", "–", "–"]);
  assert.deepEqual([0, 0.421, 17.31, 640.2, 12_345].map(format.figure), ["0", "0.42", "17.3", "640", "12,345"]);
  assert.deepEqual([0, 0.5, 0.9873, 1, null].map(format.percent), ["0 %", "50 %", "98.7 %", "100 %", "–"]);
  assert.deepEqual([459_000, 1_049_000, 494_000_000, 7.6e9].map(format.parameters), ["459 k", "1.0 M", "494 M", "7.6 B"]);
});

test("ticks are round and within the axis", () => {
  assert.deepEqual(format.ticks(0, 100, 5), [0, 20, 40, 60, 80, 100]);
  assert.deepEqual(format.ticks(0.76, 1.01, 5), [0.8, 0.85, 0.9, 0.95, 1]);
  assert.deepEqual(format.ticks(1, 1, 5), [1]);
});
