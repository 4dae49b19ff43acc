// Prometheus' text format: parsing, and what of it the live view reads.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };
// kind -> family, and the label whose values are told apart; all others are summed over
const COUNTERS = {
  requests: ["sortserve_requests_total", "submodel"],
  tokens: ["sortserve_generation_tokens_total", "submodel"],
  budgets: ["sortserve_budget_requests_total", "outcome"],
  ttft: ["sortserve_time_to_first_token_seconds_bucket", "le"],
  goodput: ["sortserve_goodput_total", "submodel"],
  quality: ["sortserve_quality_ratio_sum", "outcome"],
  answers: ["sortserve_quality_ratio_count", "outcome"],
  tpot: ["sortserve_time_per_output_token_seconds_bucket", "le"],
};
const EVENTS = {
  switches: "sortserve_submodel_switches_total",
  refilled: "sortserve_refilled_tokens_total",
  preemptions: "sortserve_preemptions_total",
  restarts: "sortserve_engine_restarts_total",
  prefixQueries: "sortserve_prefix_cache_queries_total",
  prefixHits: "sortserve_prefix_cache_hits_total",
  dropped: "sortserve_requests_dropped_total",
};

/** Sample name -> [{labels, value}]. Lines it cannot read are left out. */
export function parseMetrics(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line.trim());
    if (match === null) continue;
    const [, name, written, value] = match;
    const labels = {};
    for (const [, label, quoted] of (written ?? "").matchAll(LABEL)) {
      labels[label] = quoted.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
    }
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels, value: numberOf(value) });
  }
  return samples;
}

/** One scrape as the live view keeps it: counters by kind and name, gauges, and what is served. */
export function readingOf(samples, seconds) {
  const all = (name) => samples.get(name) ?? [];
  const gauge = (name) => all(name)[0]?.value ?? 0;
  const counters = {};
  const count = (kind, key, value) => {
    counters[kind] ??= new Map();
    counters[kind].set(key, (counters[kind].get(key) ?? 0) + value);
  };
  for (const [kind, [name, label]] of Object.entries(COUNTERS)) {
    for (const { labels, value } of all(name)) count(kind, labels[label], value);
  }
  for (const [kind, name] of Object.entries(EVENTS)) {
    for (const { value } of all(name)) count("events", kind, value);
  }
  return {
    seconds,
    counters,
    running: gauge("sortserve_requests_running"),
    waiting: gauge("sortserve_requests_waiting"),
    kv: gauge("sortserve_kv_cache_usage_ratio"),
    ready: gauge("sortserve_model_ready") === 1,
    model: all("sortserve_model_ready")[0]?.labels.model ?? "",
    version: all("sortserve_build_info")[0]?.labels.version ?? "",
  };
}

/** The q-quantile of a histogram, interpolated within its bucket as Prometheus does; null if it is empty.
 *  `buckets`: [upper bound, observations up to it], in any order. */
export function quantile(buckets, q) {
  const sorted = [...buckets].sort(([a], [b]) => a - b);
  const total = sorted.length ? sorted[sorted.length - 1][1] : 0;
  if (!(total > 0)) return null;
  const rank = q * total;
  let [bound, below] = [0, 0];
  for (const [upper, observed] of sorted) {
    if (observed >= rank && observed > below) {
      if (upper === Infinity) return bound; // all that is known: it was more
      return bound + ((upper - bound) * (rank - below)) / (observed - below);
    }
    [bound, below] = [upper === Infinity ? bound : upper, observed];
  }
  return bound;
}

/** A number as the format writes it. */
export function numberOf(text) {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}
