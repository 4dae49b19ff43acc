// The last minutes of scrapes, and rates over a sliding window of them.
//
// Counters are kept as running totals that never fall: where one did, its process had started anew, and what it shows
// counts from zero. A moment without a scrape (server away, engine restarting) is kept too, as a gap.

import { numberOf, quantile } from "./metrics.js";

const NO_BUDGET = "no-budget"; // the metrics' outcome of a request that had none to keep
const UNKNOWN = Object.freeze({ p50: null, p95: null });

export class History {
  /** Keeps `span` seconds, and shows rates over `window` seconds. */
  constructor(span, window) {
    this.span = span;
    this.window = window;
    this.points = []; // one per moment, oldest first
    this.moments = []; // {seconds, reading, totals}, the last two null in a gap
  }

  /** Add one scrape, or null for a gap, at `seconds`. */
  add(reading, seconds) {
    const before = this.moments.findLast((moment) => moment.reading !== null);
    this.moments.push({ seconds, reading, totals: reading && totalsAfter(before, reading.counters) });
    while (this.moments[0].seconds < seconds - this.span) {
      this.moments.shift();
      this.points.shift();
    }
    this.points.push(this.#point(this.moments.length - 1));
  }

  /** Show rates over another window, the past included. */
  setWindow(window) {
    this.window = window;
    this.points = this.moments.map((_, place) => this.#point(place));
  }

  #point(place) {
    const moment = this.moments[place];
    const earliest = moment.seconds - this.window - 0.5; // scrapes come a second apart, give or take
    const start = this.moments.slice(0, place).find(({ reading, seconds }) => reading !== null && seconds >= earliest);
    return pointOf(moment, start);
  }
}

/** Running totals by kind and name, of a scrape and the one before it. */
function totalsAfter(before, counters) {
  const totals = {};
  for (const [kind, values] of Object.entries(counters)) {
    totals[kind] = new Map(before?.totals[kind]);
    for (const [name, value] of values) {
      const last = before?.reading.counters[kind]?.get(name) ?? 0;
      const more = value >= last ? value - last : value;
      totals[kind].set(name, (totals[kind].get(name) ?? 0) + more);
    }
  }
  return totals;
}

/** What is shown of one moment; null where nothing is known. Rates per second, latencies in milliseconds. */
function pointOf({ seconds, reading, totals }, start) {
  const point = {
    seconds,
    requests: null,
    tokens: null,
    attainment: null,
    budgets: 0,
    quality: null,
    goodput: null,
    ttft: UNKNOWN,
    tpot: UNKNOWN,
  };
  if (reading === null) return { ...point, running: null, waiting: null, kv: null };
  Object.assign(point, { running: reading.running, waiting: reading.waiting, kv: reading.kv });
  if (start === undefined) return point;
  const elapsed = seconds - start.seconds;
  const grown = (kind) => growth(start.totals[kind], totals[kind]);
  const perSecond = (kind) => Object.fromEntries(grown(kind).map(([name, more]) => [name, more / elapsed]));
  const outcomes = grown("budgets");
  const asked = totalOf(outcomes);
  const met = outcomes.find(([outcome]) => outcome === "met")?.[1] ?? 0;
  const answers = withBudget(grown("answers"));
  return {
    ...point,
    requests: perSecond("requests"),
    tokens: perSecond("tokens"),
    budgets: asked,
    attainment: asked > 0 ? met / asked : null,
    quality: answers > 0 ? withBudget(grown("quality")) / answers : null,
    goodput: totalOf(grown("goodput")) / elapsed,
    ttft: percentiles(grown("ttft")),
    tpot: percentiles(grown("tpot")),
  };
}

/** [name, growth] of each counter of a kind. */
function growth(before, after) {
  return [...(after ?? [])].map(([name, total]) => [name, total - (before?.get(name) ?? 0)]);
}

const totalOf = (grown) => grown.reduce((sum, [, more]) => sum + more, 0);
const withBudget = (grown) => totalOf(grown.filter(([outcome]) => outcome !== NO_BUDGET));

function percentiles(grown) {
  const buckets = grown.map(([bound, more]) => [numberOf(bound), more]);
  const at = (q) => {
    const seconds = quantile(buckets, q);
    return seconds === null ? null : seconds * 1e3;
  };
  return { p50: at(0.5), p95: at(0.95) };
}
