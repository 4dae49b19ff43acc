// Numbers and times as people read them, and round numbers for axes.

const COUNT = new Intl.NumberFormat("en");

/** `4.2 ms`, `312 ms`, `1.24 s`; a dash for null. */
export function duration(ms) {
  if (ms === null || ms === undefined || !Number.isFinite(ms)) return "–";
  if (ms >= 9999.5) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 999.5) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 9.95 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

/** `1,234`; a dash for null. */
export function count(value) {
  return value === null || value === undefined ? "–" : COUNT.format(value);
}

/** A rate or another number of any size with about three digits: `0.42`, `17.3`, `640`, `1,204`. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (value >= 99.95) return COUNT.format(Math.round(value));
  return value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

/** A round number of an axis: `0.5`, `20`, `1,500`. */
export function tick(value) {
  return COUNT.format(Number(value.toPrecision(3)));
}

/** A duration of an axis: `0`, `20 ms`, `1.5 s`. */
export function durationTick(ms) {
  if (ms === 0) return "0";
  return ms >= 1000 ? `${tick(ms / 1000)} s` : `${tick(ms)} ms`;
}

/** `98 %`, `99.4 %`; a dash for null. */
export function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  const value = share * 100;
  return `${value === 0 || value >= 99.95 || Math.abs(value - Math.round(value)) < 0.05 ? Math.round(value) : value.toFixed(1)} %`;
}

/** `2.2 M`, `494 M`, `7.6 B`. */
export function parameters(value) {
  const [divisor, unit] = value >= 1e9 ? [1e9, "B"] : value >= 1e6 ? [1e6, "M"] : [1e3, "k"];
  const scaled = value / divisor;
  return `${scaled >= 99.5 ? Math.round(scaled) : scaled.toFixed(scaled >= 9.95 ? 0 : 1)} ${unit}`;
}

/** Round numbers within [low, high], about `wanted` of them. */
export function ticks(low, high, wanted) {
  if (!(high > low)) return [low];
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((unit) => unit * power).find((size) => size >= rough * 0.8);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high * (1 + 1e-9); place++) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}
