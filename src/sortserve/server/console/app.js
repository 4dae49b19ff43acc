// The console: a header that says what is served and whether it is there, and the three views.

import { html, render, useCallback, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { Api } from "./api.js";
import { KeyField } from "./controls.js";
import { Ladder } from "./ladder.js";
import { Live } from "./live.js";
import { Playground } from "./playground.js";
import { useServer } from "./server.js";
import { TabList, TabPanel, useTab } from "./tabs.js";
import { tints as tintsOf } from "./tint.js";

const KEY = "sortserve.api-key"; // in sessionStorage: gone with the tab
const REFRESH_MS = 10_000; // predictions follow the load
const TABS = [
  { id: "playground", label: "Playground" },
  { id: "live", label: "Live" },
  { id: "ladder", label: "Ladder" },
];
const PHASES = {
  connecting: "connecting",
  ready: "ready",
  loading: "loading",
  draining: "shutting down",
  restarting: "restarting",
  unreachable: "not reachable",
};

function App() {
  const [key, setKey] = useState(() => sessionStorage.getItem(KEY) ?? "");
  const api = useMemo(() => new Api(key), [key]);
  const server = useServer(api);
  const [chosen, choose] = useTab(TABS);
  const [pinned, setPinned] = useState(null);
  const served = useServed(api, server.phase, chosen);
  const ids = useMemo(() => served.ladder.map((entry) => entry.id), [served.ladder.map((entry) => entry.id).join()]);
  const tints = useMemo(() => tintsOf(ids), [ids]);
  const remember = (typed) => {
    sessionStorage.setItem(KEY, typed);
    setKey(typed);
  };
  useEffect(() => {
    if (pinned !== null && ids.length > 0 && !ids.includes(pinned)) setPinned(null); // another model is served now
  }, [ids]);

  return html` <${Header} server=${server} apiKey=${key} onKey=${remember} keyRefused=${served.keyRefused}>
      <${TabList} tabs=${TABS} chosen=${chosen} onChoose=${choose} />
    <//>
    <main>
      <h1 class="unseen">SortServe console</h1>
      <${Notice} server=${server} keyRefused=${served.keyRefused} hasKey=${key !== ""} />
      <${TabPanel} id="playground" chosen=${chosen}>
        <${Playground}
          api=${api}
          ladder=${served.ladder}
          ids=${ids}
          tints=${tints}
          hasTemplate=${served.hasTemplate}
          ready=${server.phase === "ready"}
          pinned=${pinned}
          onUnpin=${() => setPinned(null)}
          onFinished=${served.refresh}
        />
      <//>
      <${TabPanel} id="live" chosen=${chosen}
        >${chosen === "live" && html`<${Live} server=${server} ids=${ids} tints=${tints} />`}<//
      >
      <${TabPanel} id="ladder" chosen=${chosen}>
        <${Ladder} ladder=${served.ladder} tints=${tints} pinned=${pinned} onPin=${setPinned} />
      <//>
    </main>`;
}

/** What is served, asked again while predictions are looked at. `keyRefused`: the server wants another API key. */
function useServed(api, phase, view) {
  const [served, setServed] = useState({ ladder: [], hasTemplate: false, keyRefused: false });
  const last = useRef(0); // the number of the last question: an answer to an earlier one may come later, of an older key
  const refresh = useCallback(async () => {
    const asked = ++last.current;
    let found;
    try {
      const [ladder, tokenizer] = await Promise.all([api.json("v1/submodels"), api.json("tokenizer_info")]);
      found = { ladder: ladder.data, hasTemplate: Boolean(tokenizer.chat_template), keyRefused: false };
    } catch (reason) {
      if (reason.status !== 401) return; // it shows in the server's phase, and what was known stays
      found = { keyRefused: true };
    }
    if (asked === last.current) setServed((before) => ({ ...before, ...found }));
  }, [api]);
  useEffect(() => {
    if (phase !== "ready") return undefined;
    refresh();
    if (view === "live") return undefined;
    const timer = setInterval(() => document.hidden || refresh(), REFRESH_MS);
    return () => clearInterval(timer);
  }, [refresh, phase, view]);
  return { ...served, refresh };
}

function Header({ server, apiKey, onKey, keyRefused, children }) {
  const { reading, phase } = server;
  return html`<header class="top">
    <div class="brand">
      <img src="console/favicon.svg" alt="" width="26" height="26" />
      <span class="name">SortServe</span>
      ${reading?.model && html`<span class="model" title="Model">${reading.model}</span>`}
      ${reading?.version && html`<span class="version" title="Version">${reading.version}</span>`}
    </div>
    ${children}
    <div class="connection">
      <p class=${`phase ${phase}`} role="status"><i aria-hidden="true"></i>${PHASES[phase]}</p>
      <${KeyField} apiKey=${apiKey} onKey=${onKey} refused=${keyRefused} />
    </div>
  </header>`;
}

function Notice({ server, keyRefused, hasKey }) {
  if (server.phase === "ready" && keyRefused) {
    return html`<p class="notice" role="alert">
      ${hasKey ? "The server does not know this API key." : "This server asks for an API key: give one at the top of the page."}
    </p>`;
  }
  if (server.phase === "ready" || server.phase === "connecting") return null;
  return html`<p class="notice" role="status"><b>${PHASES[server.phase]}</b> ${server.message}</p>`;
}

render(html`<${App} />`, document.getElementById("app"));
