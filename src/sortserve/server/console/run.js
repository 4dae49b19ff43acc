// One answer, from asking to its end: what has come so far, and what the server tells of it.

import { useEffect, useReducer, useRef } from "./vendor/htm-preact-standalone.js";
import { ApiError } from "./api.js";
import { submodelOf } from "./tint.js";

const FRAME_MS = 50;

/** States: idle, waiting (no token yet), streaming, done, stopped, failed. Calls `changed` whenever something is new,
 *  with true where it begins or ends. */
export class Run {
  constructor(changed) {
    this.changed = changed;
    this.controller = null;
    this.#clear("idle");
  }

  get busy() {
    return this.state === "waiting" || this.state === "streaming";
  }

  /** Milliseconds since it was asked, by this machine's clock. */
  get clockMs() {
    return (this.endedAt ?? performance.now()) - this.startedAt;
  }

  /** Milliseconds it took: the server's figure if there is one. */
  get takenMs() {
    return this.told?.elapsed_ms ?? this.clockMs;
  }

  /** Ask; returns when the answer has ended, however it did. `request`: {path, body, headers, budgetMs}. */
  async start(api, request) {
    this.stop();
    this.#clear("waiting");
    this.budgetMs = request.budgetMs;
    const controller = (this.controller = new AbortController());
    this.startedAt = performance.now();
    this.changed(true);
    try {
      const answer = await api.generate(request.path, request.body, request.headers, controller.signal);
      this.#head(answer.headers);
      for await (const chunk of answer.chunks) {
        if (controller !== this.controller || controller.signal.aborted) return;
        this.#take(chunk);
        this.changed();
      }
      this.#end("done");
    } catch (reason) {
      if (controller !== this.controller || controller.signal.aborted) return; // stopped, or another took its place
      this.error = asError(reason);
      this.#end("failed");
    }
  }

  /** Stop it, if it is under way: the server hears of it by the connection that closes. */
  stop() {
    if (!this.busy) return;
    this.controller.abort();
    this.#end("stopped");
  }

  #clear(state) {
    this.state = state;
    this.pieces = []; // {text, submodel, atMs}: what each chunk brought
    this.predictedMs = null;
    this.budgetMs = null;
    this.budgetStatus = null;
    this.requestId = null;
    this.told = null; // the `sortserve` object
    this.finishReason = null;
    this.error = null;
    this.startedAt = performance.now();
    this.endedAt = null;
  }

  #head(headers) {
    const predicted = headers.get("X-Latency-Predicted-Ms");
    this.predictedMs = predicted === null ? null : Number(predicted);
    this.budgetStatus = headers.get("X-Latency-Budget-Status");
    this.requestId = headers.get("X-Request-Id");
  }

  #take(chunk) {
    if (chunk.sortserve) this.told = chunk.sortserve;
    const choice = chunk.choices[0];
    if (!choice) return;
    const text = choice.text ?? choice.delta?.content ?? "";
    if (text) {
      this.state = "streaming";
      this.pieces.push({
        text,
        submodel: submodelOf(chunk.system_fingerprint),
        atMs: performance.now() - this.startedAt,
      });
    }
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  #end(state) {
    this.endedAt = performance.now();
    this.state = state;
    this.changed(true);
  }
}

/** Tokens by sub-model: as the server counted them, else as they were seen. Largest sub-model last, as `ids` has it. */
export function tokensBySubmodel(run, ids) {
  const counts = new Map(Object.entries(run.told?.submodels ?? {}));
  if (run.told === null) {
    for (const { submodel } of run.pieces) if (submodel) counts.set(submodel, (counts.get(submodel) ?? 0) + 1);
  }
  return [...counts].sort(([a], [b]) => ids.indexOf(a) - ids.indexOf(b));
}

/** As many runs as asked for, kept for as long as the component lives. It renders at most every FRAME_MS while tokens
 *  come: on a machine that computes the model too, drawing each token apart costs the model time. */
export function useRuns(number) {
  const [, render] = useReducer((renders) => renders + 1, 0);
  const runs = useRef([]);
  const timer = useRef(0);
  const draw = () => {
    clearTimeout(timer.current);
    timer.current = 0;
    render();
  };
  const changed = (atOnce = false) => {
    if (atOnce) draw();
    else timer.current ||= setTimeout(draw, FRAME_MS);
  };
  while (runs.current.length < number) runs.current.push(new Run(changed));
  useEffect(
    () => () => {
      clearTimeout(timer.current);
      for (const run of runs.current) run.stop();
    },
    [],
  );
  return runs.current.slice(0, number);
}

function asError(reason) {
  if (reason instanceof ApiError) return reason;
  return new ApiError(0, { message: `The answer could not be read: ${reason.message}`, code: "unreadable" });
}
