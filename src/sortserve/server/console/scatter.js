// Quality against latency as a picture whose points are buttons.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { duration, durationTick, ticks } from "./format.js";
import { tinted } from "./tint.js";

const HEIGHT = 360;
const MARGIN = { top: 24, right: 28, bottom: 46, left: 54 };
const STRIP = 44; // for those whose quality is not measured
const ROOM = 60; // pixels that a name takes: with less for each point, one is only named when it is chosen

/** `points`: [{id, ms, quality: {value, low, high} | null, degraded}], smallest first; without a latency one is left out. */
export function Scatter({ points, tints, pinned, onToggle }) {
  const [frame, width] = useWidth();
  const shown = points.filter((point) => point.ms !== null);
  const plot = plotOf(shown, width);
  return html`<div class="scatter" ref=${frame}>
    ${shown.length === 0 && html`<p class="empty">No latency is predicted yet.</p>`}
    ${
      width > 0 &&
      shown.length > 0 &&
      html`<svg
        width=${width}
        height=${HEIGHT}
        role="group"
        aria-label="Sub-models by predicted latency and measured quality"
      >
        <${Axes} plot=${plot} />
        <path class="frontier" d=${frontier(shown, plot)} aria-hidden="true" />
        ${shown.map(
          (point) =>
            html`<${Point}
              key=${point.id}
              point=${point}
              plot=${plot}
              look=${tinted(tints.of(point.id), "dot")}
              named=${width >= shown.length * ROOM}
              isPinned=${point.id === pinned}
              onToggle=${() => onToggle(point.id)}
            />`,
        )}
      </svg>`
    }
  </div>`;
}

function Axes({ plot }) {
  const { left, right, top, bottom, x, y } = plot;
  return html`<g class="axes" aria-hidden="true">
    ${plot.yTicks.map(
      (value) =>
        html`<g key=${`y${value}`}>
          <line x1=${left} x2=${right} y1=${y(value)} y2=${y(value)} />
          <text x=${left - 10} y=${y(value) + 4} text-anchor="end">${value.toFixed(plot.yDigits)}</text>
        </g>`,
    )}
    ${plot.xTicks.map((value) => html`<text key=${`x${value}`} x=${x(value)} y=${bottom + 20} text-anchor="middle">${durationTick(value)}</text>`)}
    <line class="base" x1=${left} x2=${right} y1=${bottom} y2=${bottom} />
    ${plot.yTicks.length > 0 && html`<text class="axis-name" x=${left - 44} y=${top - 10}>quality</text>`}
    ${plot.anyUnmeasured && html`<text class="axis-name" x=${left} y=${plot.strip - 16}>not measured</text>`}
    <text class="axis-name" x=${right} y=${bottom + 40} text-anchor="end">predicted latency</text>
  </g>`;
}

function Point({ point, plot, look, named, isPinned, onToggle }) {
  const { id, ms, quality, degraded } = point;
  const [x, y] = [plot.x(ms), quality === null ? plot.strip : plot.y(quality.value)];
  const measured = quality === null ? "quality not measured" : `quality ${quality.value.toFixed(3)}`;
  const told = `${id}: ${duration(ms)}, ${measured}${degraded ? ", degraded" : ""}`;
  const onKeyDown = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    onToggle();
  };
  const atEdge = x > plot.right - 60;
  return html`<g
    class=${`point ${isPinned ? "pinned" : ""} ${degraded ? "degraded" : ""} ${named ? "named" : ""}`}
    role="button"
    tabindex="0"
    aria-pressed=${isPinned}
    aria-label=${told}
    onClick=${onToggle}
    onKeyDown=${onKeyDown}
  >
    <title>${told}</title>
    ${
      quality !== null &&
      quality.low !== null &&
      quality.low !== quality.high &&
      html`<line class="whisker" x1=${x} x2=${x} y1=${plot.y(quality.low)} y2=${plot.y(quality.high)} />`
    }
    <circle class="halo" cx=${x} cy=${y} r="14" />
    <circle class=${look.class} style=${look.style} cx=${x} cy=${y} r="6.5" />
    <text x=${atEdge ? x - 13 : x + 13} y=${y + 16} text-anchor=${atEdge ? "end" : "start"}>${id}</text>
  </g>`;
}

/** Scales and ticks. */
function plotOf(points, width) {
  const measured = points.filter((point) => point.quality !== null).map((point) => point.quality);
  const anyUnmeasured = measured.length < points.length;
  const [left, right, top] = [MARGIN.left, Math.max(width - MARGIN.right, MARGIN.left + 1), MARGIN.top];
  const bottom = HEIGHT - MARGIN.bottom;
  const floor = bottom - (anyUnmeasured ? STRIP : 0);
  const xEnd = Math.max(...points.map((point) => point.ms)) * 1.08;
  const best = Math.max(1, ...measured.map((quality) => quality.high ?? quality.value));
  const worst = Math.min(1, ...measured.map((quality) => quality.low ?? quality.value));
  const pad = Math.max((best - worst) * 0.12, 0.005);
  const [low, high] = [Math.max(0, worst - pad), best + pad / 2];
  return {
    left,
    right,
    top,
    bottom,
    anyUnmeasured,
    strip: bottom - STRIP / 2,
    x: (ms) => left + ((right - left) * ms) / xEnd,
    y: (value) => floor - ((floor - top) * (value - low)) / (high - low),
    xTicks: ticks(0, xEnd, width < 500 ? 3 : 6),
    yTicks: measured.length ? ticks(low, high, 5) : [],
    yDigits: high - low < 0.08 ? 3 : 2,
  };
}

/** A staircase along the points that no other beats in both. */
function frontier(points, plot) {
  const sorted = points.filter((point) => point.quality !== null).sort((a, b) => a.ms - b.ms);
  let best = -Infinity;
  let path = "";
  for (const { ms, quality } of sorted) {
    if (quality.value <= best) continue;
    best = quality.value;
    const [x, y] = [plot.x(ms).toFixed(1), plot.y(quality.value).toFixed(1)];
    path += path ? `H${x}V${y}` : `M${x},${y}`;
  }
  return path && `${path}H${plot.right}`;
}

/** A ref, and the width of what it refers to. */
function useWidth() {
  const frame = useRef(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(frame.current);
    return () => observer.disconnect();
  }, []);
  return [frame, width];
}
