// One answer on the page: its text with each token in the tint of the sub-model that made it, and what became of the
// budget. Nothing here is announced token by token; the playground says once what came of it.

import { Component, html } from "./vendor/htm-preact-standalone.js";
import { count, duration } from "./format.js";
import { tokensBySubmodel } from "./run.js";
import { tinted } from "./tint.js";

const BLOCK = 48; // tokens that are compared as one when the page is drawn again

export function Answer({ run, tints, ids, label, placeholder }) {
  const made = tokensBySubmodel(run, ids);
  return html`<section class="answer" aria-label=${label} aria-busy=${run.busy}>
    <${Timing} run=${run} />
    <${Strip} pieces=${run.pieces} tints=${tints} />
    <${Legend} made=${made} tints=${tints} />
    ${run.error && html`<${Failure} error=${run.error} />`}
    <div class="answer-text" tabindex=${run.pieces.length ? 0 : undefined} role="group" aria-label=${`${label}: text`}>
      ${run.pieces.length || run.busy ? html`<${Tokens} run=${run} tints=${tints} />` : !run.error && html`<p class="placeholder">${placeholder}</p>`}
    </div>
    ${run.state !== "idle" && html`<${Facts} run=${run} />`}
  </section>`;
}

/** Said once, when it has ended. */
export function outcome(run) {
  if (run.state === "failed") return `Failed: ${run.error.message}`;
  if (run.state === "stopped") return `Stopped after ${run.pieces.length} tokens.`;
  const tokens = Object.values(run.told?.submodels ?? {}).reduce((sum, made) => sum + made, 0);
  const budget = run.told?.met === true ? ", budget met" : run.told?.met === false ? ", budget missed" : "";
  return `${tokens} tokens in ${duration(run.takenMs)}${budget}.`;
}

function Tokens({ run, tints }) {
  const blocks = [];
  for (let start = 0; start < run.pieces.length; start += BLOCK) {
    const end = Math.min(start + BLOCK, run.pieces.length);
    blocks.push(html`<${TokenBlock} key=${start} pieces=${run.pieces} start=${start} end=${end} tints=${tints} />`);
  }
  return html`${blocks}${run.busy && html`<span class="caret" aria-hidden="true"></span>`}`;
}

class TokenBlock extends Component {
  shouldComponentUpdate(next) {
    const { pieces, end, tints } = this.props;
    return next.pieces !== pieces || next.end !== end || next.tints !== tints;
  }

  render({ pieces, start, end, tints }) {
    return pieces.slice(start, end).map(({ text, submodel, atMs }, place) => {
      const title = `${submodel ?? "sub-model not told"} · token ${start + place + 1} · ${duration(atMs)}`;
      return html`<span
        key=${start + place}
        ...${tinted(tints.of(submodel), "token")}
        data-submodel=${submodel}
        title=${title}
        >${text}</span
      >`;
    });
  }
}

/** The answer's tokens in order as one bar: where it switched, and how much each sub-model made. */
function Strip({ pieces, tints }) {
  const runs = [];
  for (const { submodel } of pieces) {
    const last = runs[runs.length - 1];
    if (last?.submodel === submodel) last.tokens += 1;
    else runs.push({ submodel, tokens: 1 });
  }
  return html`<div class="strip" aria-hidden="true">
    ${runs.map(({ submodel, tokens }, place) => {
      const look = tinted(tints.of(submodel), "strip-part");
      return html`<i key=${place} class=${look.class} style=${{ ...look.style, flexGrow: tokens }}></i>`;
    })}
  </div>`;
}

function Legend({ made, tints }) {
  const total = made.reduce((sum, [, tokens]) => sum + tokens, 0);
  return html`<ul class="legend" aria-label="Tokens by sub-model">
    ${made.map(
      ([id, tokens]) =>
        html`<li key=${id}>
          <span ...${tinted(tints.of(id), "token swatch")}>${id}</span> <b>${count(tokens)}</b>
          <span class="quiet">${Math.round((100 * tokens) / total)} %</span>
        </li>`,
    )}
  </ul>`;
}

/** Time taken, against what was predicted and what was allowed, on one scale. */
function Timing({ run }) {
  const idle = run.state === "idle";
  const taken = idle ? null : run.takenMs;
  const scale = Math.max(run.budgetMs ?? 0, run.predictedMs ?? 0, taken ?? 0, 1) * 1.06;
  const at = (ms) => `${((ms / scale) * 100).toFixed(2)}%`;
  const late = run.budgetMs !== null && taken > run.budgetMs;
  return html`<div class="timing">
    <div class="timing-head">
      <output class="taken">${duration(taken)}</output>
      <${Verdict} run=${run} />
    </div>
    <div class="timing-bar" aria-hidden="true">
      <i class=${`timing-fill ${late ? "late" : ""}`} style=${{ width: taken === null ? "0%" : at(taken) }}></i>
      ${run.predictedMs !== null && html`<i class="timing-mark predicted" style=${{ left: at(run.predictedMs) }}></i>`}
      ${run.budgetMs !== null && html`<i class="timing-mark allowed" style=${{ left: at(run.budgetMs) }}></i>`}
    </div>
    <p class="timing-key">
      <span><i class="key predicted" aria-hidden="true"></i>predicted <b>${duration(run.predictedMs)}</b></span>
      <span
        ><i class="key allowed" aria-hidden="true"></i>budget
        <b>${run.budgetMs === null ? "none" : duration(run.budgetMs)}</b></span
      >
    </p>
  </div>`;
}

function Verdict({ run }) {
  if (run.state === "waiting") return html`<span class="badge">waiting</span>`;
  if (run.state === "streaming") return html`<span class="badge">streaming</span>`;
  if (run.state === "stopped") return html`<span class="badge">stopped</span>`;
  if (run.state === "failed") return html`<span class="badge bad">failed</span>`;
  if (run.state === "idle") return null;
  if (run.told?.cut) return html`<span class="badge warn">cut in time</span>`;
  if (run.told?.met === true) {
    const spare = run.budgetMs === null ? "" : ` · ${duration(Math.max(0, run.budgetMs - run.takenMs))} to spare`;
    return html`<span class="badge good">met${spare}</span>`;
  }
  if (run.told?.met === false) {
    const over =
      run.budgetMs === null || run.takenMs <= run.budgetMs ? "" : ` by ${duration(run.takenMs - run.budgetMs)}`;
    return html`<span class="badge bad">missed${over}</span>`;
  }
  return html`<span class="badge">no budget</span>`;
}

function Facts({ run }) {
  const { told } = run;
  const tokens = told ? Object.values(told.submodels).reduce((sum, made) => sum + made, 0) : run.pieces.length;
  const facts = [
    ["First token", duration(told?.ttft_ms ?? run.pieces[0]?.atMs)],
    ["Per token", duration(told?.tpot_ms)],
    ["Tokens", count(tokens)],
    ["Switches", count(told?.switches)],
    ["Refilled", count(told?.refilled_tokens)],
    ["K/V", told?.kv ?? "–"],
    ["Ended by", run.finishReason ?? "–"],
  ];
  return html`<dl class="facts">
    ${facts.map(
      ([name, value]) =>
        html`<div key=${name}>
          <dt>${name}</dt>
          <dd>${value}</dd>
        </div>`,
    )}
  </dl>`;
}

function Failure({ error }) {
  const details = [
    error.status >= 400 && `HTTP ${error.status}`,
    error.type,
    error.param && `parameter ${error.param}`,
    error.retryAfter && `try again in ${error.retryAfter} s`,
  ].filter(Boolean);
  return html`<div class="failure" role="alert">
    <p><strong>${(error.code ?? "error").replaceAll("_", " ")}</strong></p>
    <p>${error.message}</p>
    ${details.length > 0 && html`<p class="quiet">${details.join(" · ")}</p>`}
  </div>`;
}
