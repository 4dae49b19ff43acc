// A uPlot chart of the history: its data follow, its size is its frame's, its colours are the theme's.

import { html, useEffect, useRef } from "./vendor/htm-preact-standalone.js";
import uPlot from "./vendor/uPlot.esm.js";

const DARK = "(prefers-color-scheme: dark)";
const HEIGHT = 132;

/** `series`: [{values, colour(dark), dash, fill}], over `times` (seconds since 1970). `format` writes the scale's numbers,
 *  `top` is the least upper end of the scale, `onHover(place | null)` tells which moment the pointer is at. */
export function Chart({ label, times, series, format, top, span, onHover }) {
  const frame = useRef(null);
  const plot = useRef(null);
  const latest = useRef(null);
  latest.current = { series, format, top, span, onHover };
  const shape = series.map(({ name }) => name).join("|");

  useEffect(() => {
    const chart = new uPlot(optionsOf(latest), [[], ...series.map(() => [])], frame.current);
    plot.current = chart;
    const observer = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width > 0) chart.setSize({ width, height: HEIGHT });
    });
    observer.observe(frame.current);
    const theme = matchMedia(DARK);
    const redraw = () => chart.redraw(false, true);
    theme.addEventListener("change", redraw);
    return () => {
      theme.removeEventListener("change", redraw);
      observer.disconnect();
      chart.destroy();
      plot.current = null;
    };
  }, [shape]);

  useEffect(() => {
    plot.current?.setData([times, ...series.map(({ values }) => values)]);
  });

  return html`<div class="chart" role="img" aria-label=${label} ref=${frame}></div>`;
}

function optionsOf(latest) {
  const style = getComputedStyle(document.documentElement);
  const variable = (name) => () => style.getPropertyValue(name).trim();
  const axis = { stroke: variable("--ink-3"), font: `11px ${variable("--sans")()}`, ticks: { show: false } };
  return {
    width: 300,
    height: HEIGHT,
    legend: { show: false },
    cursor: {
      y: false,
      points: { show: false },
      drag: { x: false, y: false },
      sync: { key: "live" },
    },
    scales: {
      x: { range: (chart, low, high) => [high - latest.current.span, high] },
      y: { range: (chart, low, high) => [0, Math.max(latest.current.top, (high ?? 0) * 1.12)] },
    },
    axes: [
      { ...axis, size: 24, gap: 4, grid: { show: false }, space: 70, values: clockTimes },
      {
        ...axis,
        size: 52,
        gap: 6,
        space: 34,
        grid: { stroke: variable("--line"), width: 1 },
        // null: uPlot has left that number out
        values: (chart, values) => values.map((value) => (value === null ? "" : latest.current.format(value))),
      },
    ],
    series: [{}, ...latest.current.series.map((_, place) => seriesOf(latest, place))],
    hooks: {
      setCursor: [(chart) => latest.current.onHover(chart.cursor.left >= 0 ? chart.cursor.idx : null)],
    },
  };
}

function seriesOf(latest, place) {
  const { dash, fill } = latest.current.series[place];
  const colour = () => latest.current.series[place].colour(matchMedia(DARK).matches);
  return {
    stroke: colour,
    width: fill ? 1 : 1.75,
    dash,
    fill: fill ? colour : undefined,
    points: { show: false },
    spanGaps: false,
  };
}

function clockTimes(chart, times) {
  return times.map((seconds) =>
    new Date(seconds * 1e3).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" }),
  );
}
