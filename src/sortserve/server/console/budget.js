// Arithmetic of latency budgets: what an answer is predicted to take, and a slider with a logarithmic scale.

/** Positions of the slider are 0 to STEPS for a budget; one more stands for none. */
export const STEPS = 200;
const LARGEST_MS = 3_600_000;
const SMALLEST_MS = 0.1;

/** Predicted milliseconds for `tokens` output tokens by one entry of /v1/submodels; null if there is no prediction. */
export function answerMs(entry, tokens) {
  if (!entry || entry.predicted_ttft_ms === null || entry.predicted_tpot_ms === null) return null;
  return entry.predicted_ttft_ms + Math.max(0, tokens - 1) * entry.predicted_tpot_ms;
}

/** The smallest sub-model that may answer: the pinned one, else the floor, else the first that is not degraded. */
export function floorOf(ladder, pinned, floor) {
  const asked = pinned ?? (floor || null);
  if (asked !== null) return ladder.find((entry) => entry.id === asked) ?? null;
  return ladder.find((entry) => !entry.degraded) ?? null;
}

/** Ends of the slider, round numbers around what the smallest and the largest sub-model take. */
export function rangeOf(feasibleMs, fullMs) {
  const low = feasibleMs === null ? 20 : feasibleMs / 4;
  const high = fullMs === null ? 20_000 : Math.max(fullMs * 5, low * 20);
  return [Math.max(SMALLEST_MS, roundDown(low)), Math.min(LARGEST_MS, roundUp(high))];
}

/** Where a budget stands on the slider; null, for no budget, at the end. */
export function toPosition(ms, [low, high]) {
  if (ms === null) return STEPS + 1;
  const share = Math.log(ms / low) / Math.log(high / low);
  return Math.round(Math.min(1, Math.max(0, share)) * STEPS);
}

/** The budget at a position, with three digits. */
export function fromPosition(position, [low, high]) {
  if (position > STEPS) return null;
  return Number((low * (high / low) ** (position / STEPS)).toPrecision(3));
}

/** Three budgets worth comparing: close to the smallest feasible, ample for the full model, and the one halfway (as
 *  ratios go). All three are budgets, because an answer without one makes the others wait for the full model's steps. */
export function threeBudgets(feasibleMs, fullMs) {
  const [tight, ample] = feasibleMs === null || fullMs === null ? [250, 4000] : [feasibleMs * 1.5, fullMs * 2.5];
  return [tight, Math.sqrt(tight * ample), ample].map((ms) => Number(ms.toPrecision(2)));
}

/** A budget as typed: milliseconds within the server's bounds, null for an empty field, undefined for nonsense. */
export function parseBudget(text) {
  if (text.trim() === "") return null;
  const ms = Number(text);
  return ms > 0 && ms <= LARGEST_MS ? ms : undefined;
}

function roundDown(ms) {
  return Number(Math.max(ms, SMALLEST_MS).toPrecision(1));
}

function roundUp(ms) {
  const power = 10 ** Math.floor(Math.log10(ms));
  return Math.ceil(ms / power - 1e-9) * power;
}
