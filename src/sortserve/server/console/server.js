// Is the server there, and what does it count? One scrape a second while the page is visible, kept as history.

import { useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { ApiError } from "./api.js";
import { History } from "./history.js";
import { parseMetrics, readingOf } from "./metrics.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 4000; // for one scrape: an engine that hangs is noticed by the server within two seconds
const SPAN_SECONDS = 600;
const WINDOW_SECONDS = 30;
const PHASES = { loading: "loading", draining: "draining", engine_failed: "restarting" };

/** `{phase, message, reading, history}`, renewed every second. Phases: connecting, ready, loading, draining,
 *  restarting, unreachable. `reading` is the last one there was. */
export function useServer(api) {
  const history = useRef(null);
  history.current ??= new History(SPAN_SECONDS, WINDOW_SECONDS);
  const [server, setServer] = useState({ phase: "connecting", message: "", reading: null });
  useEffect(() => {
    const stopped = new AbortController();
    let timer = 0;
    const tick = async () => {
      if (!document.hidden) {
        const found = await look(api, stopped.signal);
        if (stopped.signal.aborted) return;
        history.current.add(found.counted ? found.reading : null, Date.now() / 1e3);
        setServer((before) => ({
          phase: found.phase,
          message: found.message,
          reading: found.reading ?? before.reading,
        }));
      }
      timer = setTimeout(tick, EVERY_MS);
    };
    tick();
    return () => {
      stopped.abort();
      clearTimeout(timer);
    };
  }, [api]);
  return { ...server, history: history.current };
}

/** One scrape. `counted`: the engine's own counters are in it; without an engine they read zero. */
async function look(api, stop) {
  const signal = AbortSignal.any([stop, AbortSignal.timeout(PATIENCE_MS)]);
  try {
    const reading = readingOf(parseMetrics(await api.text("metrics", signal)), Date.now() / 1e3);
    if (reading.ready) return { phase: "ready", message: "", reading, counted: true };
    const { phase, message } = await whyNotReady(api, signal);
    return { phase, message, reading, counted: phase === "draining" };
  } catch (reason) {
    const message = reason instanceof ApiError ? reason.message : "The server does not answer.";
    return { phase: "unreachable", message, reading: null, counted: false };
  }
}

async function whyNotReady(api, signal) {
  try {
    await api.json("ready", signal);
  } catch (reason) {
    if (reason instanceof ApiError && reason.status === 503) {
      return { phase: PHASES[reason.code] ?? "restarting", message: reason.message };
    }
    throw reason;
  }
  return { phase: "loading", message: "" }; // it became ready between the two questions; the next tick says so
}
