// The ladder: every sub-model the server offers, its measured quality and its predicted latency; one can be pinned.

import { html } from "./vendor/htm-preact-standalone.js";
import { answerMs } from "./budget.js";
import { duration, parameters } from "./format.js";
import { Scatter } from "./scatter.js";
import { tinted } from "./tint.js";

const TOKENS = 64; // of the answer whose time stands for a sub-model's latency

export function Ladder({ ladder, tints, pinned, onPin }) {
  if (ladder.length === 0) return html`<p class="panel empty">The ladder is shown once the server is ready.</p>`;
  const toggle = (id) => onPin(id === pinned ? null : id);
  const measured = ladder.filter((entry) => entry.quality !== null);
  const widest = Math.max(...ladder.flatMap((entry) => entry.width));
  return html`<div class="ladder">
    <section class="panel" aria-labelledby="scatter-title">
      <h2 id="scatter-title">Quality against latency</h2>
      <p class="hint">
        Predicted now for an answer of ${TOKENS} tokens to a prompt of 256. ${qualityNote(ladder, measured)} Choose a
        point or a row to pin it for the playground; choose it again to let the server decide.
      </p>
      <${Scatter}
        tints=${tints}
        pinned=${pinned}
        onToggle=${toggle}
        points=${ladder.map((entry) => ({ id: entry.id, ms: answerMs(entry, TOKENS), quality: entry.quality, degraded: entry.degraded }))}
      />
    </section>
    <section class="panel" aria-labelledby="table-title">
      <h2 id="table-title">Sub-models</h2>
      <div class="scroll" role="group" tabindex="0" aria-labelledby="table-title">
        <table>
          <thead>
            <tr>
              <th scope="col">Sub-model</th>
              <th scope="col" class="number">Quality</th>
              <th scope="col" class="number">${TOKENS} tokens</th>
              <th scope="col" class="number">First token</th>
              <th scope="col" class="number">Per token</th>
              <th scope="col" class="number">Layers</th>
              <th scope="col" class="number">FFN width</th>
              <th scope="col" class="number">Skips</th>
              <th scope="col" class="number">Parameters</th>
            </tr>
          </thead>
          <tbody>
            ${ladder.map(
              (entry) =>
                html`<${Row}
                  key=${entry.id}
                  entry=${entry}
                  tints=${tints}
                  widest=${widest}
                  isPinned=${entry.id === pinned}
                  onToggle=${() => toggle(entry.id)}
                />`,
            )}
          </tbody>
        </table>
      </div>
    </section>
  </div>`;
}

function Row({ entry, tints, widest, isPinned, onToggle }) {
  const { quality } = entry;
  return html`<tr class=${isPinned ? "pinned" : ""} onClick=${onToggle}>
    <th scope="row">
      <button
        type="button"
        class="row-button"
        aria-pressed=${isPinned}
        aria-label=${`Pin ${entry.id}`}
        onClick=${(event) => (event.stopPropagation(), onToggle())}
      >
        <span ...${tinted(tints.of(entry.id), "token swatch")}>${entry.id}</span>
        ${isPinned && html`<span class="badge accent">pinned</span>`}
      </button>
    </th>
    <td class="number">
      ${
        quality === null
          ? html`<span class="quiet">not measured</span>`
          : html`${quality.value.toFixed(3)} <span class="quiet">${interval(quality)}</span>`
      }
      ${entry.degraded && html` <span class="badge warn">degraded</span>`}
    </td>
    <td class="number">${duration(answerMs(entry, TOKENS))}</td>
    <td class="number">${duration(entry.predicted_ttft_ms)}</td>
    <td class="number">${duration(entry.predicted_tpot_ms)}</td>
    <td class="number">${entry.depth}</td>
    <td class="number">${widthOf(entry.width, widest)}</td>
    <td class="number">${skipsOf(entry.skips)}</td>
    <td class="number">${parameters(entry.parameters)}</td>
  </tr>`;
}

function qualityNote(ladder, measured) {
  if (measured.length === 0) return "No quality has been measured for this model, so the points stand on one line.";
  const metric = `Quality is ${measured[0].quality.metric}, 1 for the full model; bars are 95 % intervals.`;
  const missing = ladder.length - measured.length;
  return missing === 0
    ? metric
    : `${metric} ${missing} of ${ladder.length} are not measured and stand on the line below.`;
}

function interval({ low, high }) {
  return (low ?? null) === null || (high ?? null) === null ? "" : `${low.toFixed(3)}–${high.toFixed(3)}`;
}

function widthOf(width, widest) {
  if (!Array.isArray(width)) return `${width} (${Math.round((100 * width) / widest)} %)`;
  const run = width.filter((one) => one > 0);
  return run.length ? `${Math.min(...run)}–${Math.max(...run)}` : "0";
}

function skipsOf({ attention, ffn }) {
  const parts = [attention.length && `${attention.length} attention`, ffn.length && `${ffn.length} FFN`].filter(
    Boolean,
  );
  return parts.length ? parts.join(", ") : "none";
}
