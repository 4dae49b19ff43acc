// The live view: what the server does now and did in the last minutes, from its own metrics, once a second.

import { html, useMemo, useState } from "./vendor/htm-preact-standalone.js";
import { Chart } from "./chart.js";
import { count, duration, durationTick, figure, percent, tick } from "./format.js";
import { canvasColour, tinted } from "./tint.js";

const WINDOWS = [10, 30, 60];
const [LEAST_SPAN, MOST_SPAN] = [60, 300]; // seconds that the charts show
const REFUSED = "none"; // the metrics' name for a request that no sub-model took

export function Live({ server, ids, tints }) {
  const { history, reading } = server;
  const [window, setWindow] = useState(history.window);
  const [hovered, setHovered] = useState(null);
  const points = history.points;
  const times = points.map((point) => point.seconds);
  const point = points[hovered ?? points.length - 1] ?? null;
  const names = useMemo(() => [...ids, REFUSED], [ids]);
  const choose = (seconds) => {
    history.setWindow(seconds);
    setWindow(seconds);
  };
  const span = Math.min(MOST_SPAN, Math.max(LEAST_SPAN, times[times.length - 1] - times[0]));
  const common = { times, points, point, span, onHover: setHovered };

  if (point === null || reading === null)
    return html`<p class="panel empty">${server.message || "Waiting for the first numbers."}</p>`;
  return html`<div class="live">
    <header class="live-head">
      <p class="hint">
        ${hovered === null ? "Now" : `At ${new Date(point.seconds * 1e3).toLocaleTimeString("en-GB")}`}; rates and
        percentiles over the last <b>${window} s</b>, percentiles interpolated within the buckets of the server's
        histograms.
      </p>
      <div class="segments small" role="group" aria-label="Window of rates and percentiles">
        ${WINDOWS.map(
          (seconds) =>
            html`<button
              key=${seconds}
              type="button"
              class="segment-button"
              aria-pressed=${seconds === window}
              onClick=${() => choose(seconds)}
            >
              ${seconds} s
            </button>`,
        )}
      </div>
    </header>
    <div class="grid">
      <${Stacked} title="Output tokens" unit="tokens/s" kind="tokens" names=${names} tints=${tints} ...${common} />
      <${Stacked} title="Requests" unit="requests/s" kind="requests" names=${names} tints=${tints} ...${common} />
      <${Lines}
        title="Budgets met, and quality"
        ...${common}
        top=${1}
        format=${percent}
        lines=${[
          { name: "met", value: (at) => at.attainment },
          { name: "quality", value: (at) => at.quality },
        ]}
        note=${point.budgets ? `of ${count(Math.round(point.budgets))} with a budget` : "no request with a budget"}
      />
      <${Lines}
        title="Goodput"
        ...${common}
        top=${1}
        format=${figure}
        axis=${tick}
        lines=${[{ name: "goodput", value: (at) => at.goodput }]}
        note="answers in time a second, each counted by its quality"
      />
      <${Lines}
        title="Time to first token"
        ...${common}
        top=${1}
        format=${duration}
        axis=${durationTick}
        lines=${percentiles("ttft")}
      />
      <${Lines}
        title="Time per output token"
        ...${common}
        top=${1}
        format=${duration}
        axis=${durationTick}
        lines=${percentiles("tpot")}
      />
      <${Lines}
        title="Queue"
        ...${common}
        top=${4}
        format=${count}
        axis=${(value) => (Number.isInteger(value) ? tick(value) : "")}
        lines=${[
          { name: "running", value: (at) => at.running },
          { name: "waiting", value: (at) => at.waiting },
        ]}
      />
      <${Lines}
        title="K/V memory in use"
        ...${common}
        top=${0.1}
        format=${percent}
        lines=${[{ name: "used", value: (at) => at.kv }]}
      />
      <${Events} reading=${reading} />
    </div>
  </div>`;
}

function percentiles(kind) {
  return [
    { name: "p50", value: (point) => point[kind].p50 },
    { name: "p95", value: (point) => point[kind].p95 },
  ];
}

/** Rates by sub-model, one on the other. */
function Stacked({ title, unit, kind, names, tints, times, points, point, span, onHover }) {
  const rates = point[kind];
  const total = rates && sum(rates);
  const seen = names.filter((name) => points.some((at) => at[kind]?.[name] > 0));
  // Drawn from the highest edge down, each over the one before it: a stack without holes.
  const series = seen.map((name, place) => ({
    name,
    values: points.map(
      (at) => at[kind] && seen.slice(place).reduce((height, other) => height + (at[kind][other] ?? 0), 0),
    ),
    colour: (dark) => canvasColour(tints.of(name), dark),
    fill: true,
  }));
  return html`<section class="panel metric wide" aria-labelledby=${`${kind}-title`}>
    <h2 id=${`${kind}-title`}>${title}</h2>
    <p class="big" data-metric=${kind}><b>${figure(total)}</b> <span class="quiet">${unit}</span></p>
    <${Chart}
      label=${`${title} by sub-model, last minutes; ${figure(total)} ${unit}`}
      times=${times}
      series=${series}
      format=${tick}
      top=${1}
      span=${span}
      onHover=${onHover}
    />
    <ul class="legend" aria-label=${`${title} by sub-model, ${unit}`}>
      ${seen.map(
        (name) =>
          html`<li key=${name}>
            <span ...${tinted(tints.of(name), "token swatch")}>${name === REFUSED ? "refused" : name}</span>
            <b>${figure(rates?.[name] ?? null)}</b>
          </li>`,
      )}
      ${seen.length === 0 && html`<li class="quiet">nothing in the last minutes</li>`}
    </ul>
  </section>`;
}

/** One or two lines, and their numbers. */
function Lines({ title, lines, format, top, note, axis = format, times, points, point, span, onHover }) {
  const series = lines.map(({ name, value }, place) => ({
    name,
    values: points.map(value),
    colour: (dark) => lineColour(place, lines.length, dark),
    dash: place === 1 ? [6, 4] : undefined,
  }));
  const told = lines.map(({ name, value }) => `${name} ${format(value(point))}`).join(", ");
  return html`<section class="panel metric" aria-label=${title}>
    <h2>${title}</h2>
    <p class="big" data-metric=${title}>
      ${lines.map(
        ({ name, value }, place) =>
          html`<span key=${name} class="reading">
            <b>${format(value(point))}</b>
            ${lines.length > 1 && html`<span class="quiet"><i class=${`line-key line-${place}`} aria-hidden="true"></i>${name}</span>`}
          </span>`,
      )}
      ${note && html`<span class="quiet">${note}</span>`}
    </p>
    <${Chart}
      label=${`${title}, last minutes; ${told}`}
      times=${times}
      series=${series}
      format=${axis}
      top=${top}
      span=${span}
      onHover=${onHover}
    />
  </section>`;
}

/** Counted since the server started. */
function Events({ reading }) {
  const events = reading.counters.events ?? new Map();
  const of = (name) => events.get(name) ?? 0;
  const rows = [
    ["Requests", count(sumOf(reading.counters.requests))],
    ["Output tokens", count(sumOf(reading.counters.tokens))],
    ["Switches of sub-model", count(of("switches"))],
    ["Tokens refilled", count(of("refilled"))],
    ["Prefix cache hits", of("prefixQueries") ? percent(of("prefixHits") / of("prefixQueries")) : "–"],
    ["Preemptions", count(of("preemptions"))],
    ["Requests refused", count(of("dropped"))],
    ["Engine restarts", events.has("restarts") ? count(of("restarts")) : "–"],
  ];
  return html`<section class="panel metric" aria-labelledby="totals-title">
    <h2 id="totals-title">Since the server started</h2>
    <dl class="totals">
      ${rows.map(
        ([name, value]) =>
          html`<div key=${name}>
            <dt>${name}</dt>
            <dd>${value}</dd>
          </div>`,
      )}
    </dl>
  </section>`;
}

function lineColour(place, number, dark) {
  if (number === 1 || place === 0) return dark ? "#9db2ff" : "#3450c8";
  return dark ? "#f0b35e" : "#b06a00";
}

const sum = (rates) => Object.values(rates).reduce((total, rate) => total + rate, 0);
const sumOf = (counter) => [...(counter ?? new Map()).values()].reduce((total, value) => total + value, 0);
