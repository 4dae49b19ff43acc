// Tabs as the ARIA practices describe them: one stop in the tab order, arrow keys, Home and End move and choose.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";

/** The list. `tabs`: [{id, label}]. */
export function TabList({ tabs, chosen, onChoose }) {
  const list = useRef(null);
  const onKeyDown = (event) => {
    const place = tabs.findIndex((tab) => tab.id === chosen);
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const { id } = tabs[(next + tabs.length) % tabs.length];
    onChoose(id);
    list.current.querySelector(`#tab-${id}`).focus();
  };
  return html`<div class="tabs" role="tablist" aria-label="Views" ref=${list} onKeyDown=${onKeyDown}>
    ${tabs.map(
      ({ id, label }) =>
        html`<button
          key=${id}
          type="button"
          role="tab"
          id=${`tab-${id}`}
          aria-controls=${`panel-${id}`}
          aria-selected=${id === chosen}
          tabindex=${id === chosen ? 0 : -1}
          onClick=${() => onChoose(id)}
        >
          ${label}
        </button>`,
    )}
  </div>`;
}

/** A view; it stays as it is while another one is shown, so that an answer goes on. */
export function TabPanel({ id, chosen, children }) {
  return html`<div role="tabpanel" id=${`panel-${id}`} aria-labelledby=${`tab-${id}`} hidden=${id !== chosen}>
    ${children}
  </div>`;
}

/** The chosen tab, kept in the address so that a view can be linked to. */
export function useTab(tabs) {
  const read = () => tabs.find(({ id }) => `#${id}` === location.hash)?.id ?? tabs[0].id;
  const [chosen, setChosen] = useState(read);
  useEffect(() => {
    const onHash = () => setChosen(read());
    addEventListener("hashchange", onHash);
    return () => removeEventListener("hashchange", onHash);
  }, []);
  const choose = (id) => {
    history.replaceState(null, "", `#${id}`);
    setChosen(id);
  };
  return [chosen, choose];
}
