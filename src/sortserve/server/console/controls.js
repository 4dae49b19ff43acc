// Form controls that several views use.

import { html, useState } from "./vendor/htm-preact-standalone.js";
import { fromPosition, parseBudget, STEPS, toPosition } from "./budget.js";
import { duration } from "./format.js";

/** A choice of a few, as radio buttons that look like one control. `options`: [{value, label}]. */
export function Segments({ legend, name, value, options, onChange, disabled = false }) {
  return html`<fieldset class="field segments-field" disabled=${disabled}>
    <legend>${legend}</legend>
    <div class="segments">
      ${options.map(
        (option) =>
          html`<label key=${option.value} class="segment">
            <input
              type="radio"
              name=${name}
              value=${option.value}
              checked=${option.value === value}
              onChange=${() => onChange(option.value)}
            />
            <span>${option.label}</span>
          </label>`,
      )}
    </div>
  </fieldset>`;
}

/** A number between bounds; tells of it only when it is one. */
export function NumberField({ id, label, value, min, max, step = 1, onChange }) {
  const [typed, setTyped] = useState(null); // what stands there while it is edited: "0." must not become "0"
  const isGood = (text) => {
    const number = Number(text);
    return text !== "" && number >= min && number <= max && (step !== 1 || Number.isInteger(number));
  };
  const read = (text) => {
    setTyped(text);
    if (isGood(text)) onChange(Number(text));
  };
  const bad = typed !== null && !isGood(typed);
  return html`<div class="field">
    <label for=${id}>${label}</label>
    <input
      id=${id}
      type="number"
      inputmode="decimal"
      min=${min}
      max=${max}
      step=${step}
      value=${typed ?? value}
      aria-invalid=${bad}
      aria-describedby=${bad ? `${id}-error` : undefined}
      onInput=${(event) => read(event.target.value)}
      onBlur=${() => setTyped(null)}
    />
    ${bad && html`<p class="hint bad" id="${id}-error">${min} to ${max}</p>`}
  </div>`;
}

/** The API key. What stands there while it is typed is the user's: the page is drawn anew at every scrape, and a field held
 *  at the key in use would lose it each time. Enter, or leaving the field, puts it to use. */
export function KeyField({ apiKey, onKey, refused }) {
  const [typed, setTyped] = useState(null);
  const use = () => {
    if (typed === null) return;
    setTyped(null);
    onKey(typed.trim());
  };
  return html`<form class="key" onSubmit=${(event) => (event.preventDefault(), use())}>
    <label for="api-key">API key</label>
    <input
      id="api-key"
      type="password"
      autocomplete="off"
      spellcheck="false"
      placeholder="none"
      size="12"
      value=${typed ?? apiKey}
      aria-invalid=${refused}
      onInput=${(event) => setTyped(event.target.value)}
      onBlur=${use}
    />
  </form>`;
}

/** A latency budget: a logarithmic slider whose end is "no budget", a field for exact milliseconds, and marks that say
 *  what is feasible. `marks`: [{ms, name, short, kind}]; `feasibleMs`: below it the track is hatched. */
export function BudgetControl({ id, label, budget, onChange, range, marks, feasibleMs, compact = false }) {
  const [typed, setTyped] = useState(null);
  const read = (text) => {
    const ms = parseBudget(text);
    setTyped(text);
    if (ms !== undefined) onChange(ms);
  };
  const shown = budget === null ? "" : String(budget);
  const below = feasibleMs !== null && budget !== null && budget < feasibleMs;
  const place = (ms) => `calc(var(--thumb) / 2 + (100% - var(--thumb)) * ${toPosition(ms, range) / (STEPS + 1)})`;
  return html`<div class=${`field budget ${compact ? "compact" : ""}`}>
    <div class="budget-head">
      <label for=${id}>${label}</label>
      <span class="budget-exact">
        <input
          type="text"
          inputmode="decimal"
          aria-label=${`${label}, milliseconds; empty for none`}
          placeholder="none"
          size="7"
          value=${typed ?? shown}
          aria-invalid=${typed !== null && parseBudget(typed) === undefined}
          onInput=${(event) => read(event.target.value)}
          onBlur=${() => setTyped(null)}
        />
        <span aria-hidden="true">ms</span>
      </span>
    </div>
    <div class="slider" style=${{ "--infeasible": feasibleMs === null ? "0%" : place(feasibleMs) }}>
      <input
        id=${id}
        type="range"
        min="0"
        max=${STEPS + 1}
        step="1"
        value=${toPosition(budget, range)}
        aria-valuetext=${budget === null ? "no budget" : `${duration(budget)}${below ? ", below the smallest feasible" : ""}`}
        onInput=${(event) => onChange(fromPosition(Number(event.target.value), range))}
      />
      ${marks.map(({ ms, kind }) => html`<i key=${kind} class=${`tick ${kind}`} style=${{ left: place(ms) }} aria-hidden="true"></i>`)}
    </div>
    <div class="marks">
      ${marks.map(
        ({ ms, name, short, kind }) =>
          html`<button
            key=${kind}
            type="button"
            class="mark"
            onClick=${() => onChange(ms)}
            title=${`Set the budget to what the ${name} takes`}
            aria-label=${`${duration(ms)} ${name}`}
          >
            <i class=${`tick ${kind}`} aria-hidden="true"></i><b>${duration(ms)}</b> ${compact ? short : name}
          </button>`,
      )}
      <button
        type="button"
        class="mark none"
        onClick=${() => onChange(null)}
        aria-pressed=${budget === null}
        aria-label="No budget"
      >
        none
      </button>
    </div>
  </div>`;
}
