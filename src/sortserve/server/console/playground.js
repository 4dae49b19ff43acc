// The playground: one prompt, answered under one latency budget, or under three side by side.

import { html, useMemo, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { Answer, outcome } from "./answer.js";
import { answerMs, floorOf, rangeOf, threeBudgets } from "./budget.js";
import { BudgetControl, NumberField, Segments } from "./controls.js";
import { useRuns } from "./run.js";
import { tinted } from "./tint.js";

const POLICIES = [
  { value: "best-effort", label: "Best effort", means: "Served even if it will be late, by the floor." },
  { value: "strict", label: "Strict", means: "Refused if the budget cannot be kept." },
  { value: "cut", label: "Cut", means: "Ends early enough to keep the budget." },
];
const PLACEHOLDER = "The answer appears here, each token in the tint of the sub-model that made it.";
const FIRST = {
  prompt: "Once upon a time there was a king",
  endpoint: "completion",
  maxTokens: 64,
  temperature: 0.8,
  policy: "best-effort",
  floor: "",
};

export function Playground({ api, ladder, ids, tints, hasTemplate, ready, pinned, onUnpin, onFinished }) {
  const [settings, setSettings] = useState(FIRST);
  const [budget, setBudget] = useState(null);
  const [compared, setCompared] = useState(null); // three budgets, or null for one answer
  const [said, setSaid] = useState("");
  const runs = useRuns(compared ? 3 : 1);
  const form = useRef(null);
  const answers = useRef(null);
  const set = (name) => (value) => setSettings((before) => ({ ...before, [name]: value }));

  const times = useMemo(() => feasible(ladder, pinned, settings), [ladder, pinned, settings]);
  const range = rangeOf(times.feasibleMs, times.fullMs);
  const budgets = compared ?? [budget];
  const busy = runs.some((run) => run.busy);

  const start = async () => {
    if (busy || !ready || settings.prompt === "") return;
    intoView(answers.current);
    const seed = Math.floor(Math.random() * 2 ** 31); // the same for all three: only the sub-models differ
    const requests = budgets.map((ms) => requestOf(settings, ms, pinned, seed, hasTemplate));
    await Promise.all(runs.map((run, place) => run.start(api, requests[place])));
    setSaid(runs.map((run, place) => (compared ? `Answer ${place + 1}: ${outcome(run)}` : outcome(run))).join(" "));
    onFinished();
  };
  const stop = () => runs.forEach((run) => run.stop());
  const compare = (on) => {
    stop();
    setCompared(on ? threeBudgets(times.feasibleMs, times.fullMs) : null);
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.current.requestSubmit();
    } else if (event.key === "Escape" && busy) stop();
  };
  const control = { range, marks: marksOf(times), feasibleMs: times.feasibleMs };

  return html`<div class=${`playground ${compared ? "comparing" : ""}`} onKeyDown=${onKeyDown}>
    <form
      ref=${form}
      class="request panel"
      aria-label="Request"
      onSubmit=${(event) => (event.preventDefault(), start())}
    >
      <${Settings}
        settings=${settings}
        set=${set}
        hasTemplate=${hasTemplate}
        ladder=${ladder}
        pinned=${pinned}
        tints=${tints}
        onUnpin=${onUnpin}
      />
      ${!compared && html`<${BudgetControl} id="budget" label="Latency budget" budget=${budget} onChange=${setBudget} ...${control} />`}
      <${Policy} value=${settings.policy} onChange=${set("policy")} />
      <label class="switch">
        <input
          type="checkbox"
          role="switch"
          checked=${compared !== null}
          onChange=${(event) => compare(event.target.checked)}
        />
        <span>Compare three budgets</span>
      </label>
      <div class="actions">
        ${
          // keys, so that the one is never turned into the other under a click
          busy
            ? html`<button key="stop" type="button" class="primary stop" onClick=${stop}>Stop <kbd>Esc</kbd></button>`
            : html`<button key="ask" type="submit" class="primary" disabled=${!ready || settings.prompt === ""}>
                ${compared ? "Ask three times" : "Ask"} <kbd>Ctrl ↵</kbd>
              </button>`
        }
      </div>
    </form>
    <div class="answers" ref=${answers}>
      ${runs.map(
        (run, place) =>
          html`<div key=${place} class="column panel">
            ${
              compared &&
              html`<${BudgetControl}
                id=${`budget-${place}`}
                label=${`Budget ${place + 1}`}
                budget=${compared[place]}
                compact
                ...${control}
                onChange=${(ms) => setCompared(compared.map((other, at) => (at === place ? ms : other)))}
              />`
            }
            <${Answer}
              run=${run}
              tints=${tints}
              ids=${ids}
              label=${compared ? `Answer ${place + 1}` : "Answer"}
              placeholder=${compared ? "The answer under this budget." : PLACEHOLDER}
            />
          </div>`,
      )}
    </div>
    <p class="unseen" role="status" aria-live="polite">${busy ? "Answering." : said}</p>
  </div>`;
}

function Settings({ settings, set, hasTemplate, ladder, pinned, tints, onUnpin }) {
  return html` ${
      hasTemplate &&
      html`<${Segments}
        legend="Ask as"
        name="endpoint"
        value=${settings.endpoint}
        onChange=${set("endpoint")}
        options=${[
          { value: "completion", label: "Completion" },
          { value: "chat", label: "Chat" },
        ]}
      />`
    }
    <div class="field">
      <label for="prompt">Prompt</label>
      <textarea
        id="prompt"
        rows="4"
        spellcheck="false"
        value=${settings.prompt}
        onInput=${(event) => set("prompt")(event.target.value)}
      ></textarea>
    </div>
    <div class="pair">
      <${NumberField}
        id="max-tokens"
        label="Max tokens"
        value=${settings.maxTokens}
        min=${1}
        max=${1_000_000}
        onChange=${set("maxTokens")}
      />
      <${NumberField}
        id="temperature"
        label="Temperature"
        value=${settings.temperature}
        min=${0}
        max=${2}
        step=${0.1}
        onChange=${set("temperature")}
      />
    </div>
    ${
      pinned
        ? html`<div class="field">
            <span class="label">Sub-model</span>
            <p class="pin">
              <span ...${tinted(tints.of(pinned), "token swatch")}>${pinned}</span> pinned for every answer
              <button type="button" class="quiet-button" onClick=${onUnpin}>Unpin</button>
            </p>
          </div>`
        : html`<div class="field">
            <label for="floor">Smallest sub-model accepted</label>
            <select id="floor" value=${settings.floor} onChange=${(event) => set("floor")(event.target.value)}>
              <option value="">The server's choice</option>
              ${ladder.map((entry) => html`<option key=${entry.id} value=${entry.id}>${entry.id}${entry.degraded ? " (degraded)" : ""}</option>`)}
            </select>
          </div>`
    }`;
}

function Policy({ value, onChange }) {
  return html`<div>
    <${Segments} legend="If time is short" name="policy" value=${value} options=${POLICIES} onChange=${onChange} />
    <p class="hint">${POLICIES.find((policy) => policy.value === value).means}</p>
  </div>`;
}

/** On a narrow page the answers are below the form. */
function intoView(element) {
  if (element.getBoundingClientRect().top < innerHeight - 200) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  element.scrollIntoView({ block: "start", behavior });
}

/** What the smallest and the largest sub-model that may answer are predicted to take, in milliseconds, or null. */
function feasible(ladder, pinned, { floor, maxTokens }) {
  const smallest = floorOf(ladder, pinned, floor);
  const largest = pinned ? smallest : (ladder[ladder.length - 1] ?? null);
  return { feasibleMs: answerMs(smallest, maxTokens), fullMs: answerMs(largest, maxTokens), pinned: pinned !== null };
}

function marksOf({ feasibleMs, fullMs, pinned }) {
  const marks = [];
  if (feasibleMs !== null) {
    const name = pinned ? "pinned sub-model" : "smallest feasible";
    marks.push({ ms: rounded(feasibleMs), name, short: pinned ? "pinned" : "smallest", kind: "floor" });
  }
  if (fullMs !== null && !pinned) marks.push({ ms: rounded(fullMs), name: "full model", short: "full", kind: "full" });
  return marks;
}

/** Up, so that a budget set to a mark is one that can be kept. */
function rounded(ms) {
  const unit = 10 ** (Math.floor(Math.log10(ms)) - 2);
  return Number((Math.ceil(ms / unit) * unit).toPrecision(3));
}

function requestOf(settings, budgetMs, pinned, seed, hasTemplate) {
  const chat = hasTemplate && settings.endpoint === "chat";
  const headers = {};
  if (budgetMs !== null) {
    headers["X-Latency-Budget-Ms"] = String(budgetMs);
    headers["X-Latency-Budget-Policy"] = settings.policy;
  }
  if (pinned) headers["X-Submodel"] = pinned;
  else if (settings.floor) headers["X-Submodel-Floor"] = settings.floor;
  const asked = chat ? { messages: [{ role: "user", content: settings.prompt }] } : { prompt: settings.prompt };
  return {
    path: chat ? "v1/chat/completions" : "v1/completions",
    headers,
    budgetMs,
    body: {
      ...asked,
      max_tokens: settings.maxTokens,
      temperature: settings.temperature,
      seed,
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}
