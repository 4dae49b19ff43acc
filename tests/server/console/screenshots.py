"""Makes docs/screenshots/ again: `python -m tests.server.console.screenshots [NAME ...]` with a Chromium on the machine.

A server of the bundled model is started for it, and what is seen is real: its answers, its traffic, its predictions.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.bundled import MIDDLE
from tests.server.console.browser import Console, chromium, console_page, executable
from tests.server.real_server import serving
from tests.server.test_bundled import PROMPT

OUT = Path(__file__).resolve().parents[3] / "docs" / "screenshots"
PROMPTS = ("The ship lay at anchor and", "In the morning the old man", "She opened the letter, and", PROMPT)
TRAFFIC_SECONDS = 70  # so that the charts have something to show


def playground(console: Console) -> None:
    """One answer that switches: a budget between what the smallest and the full sub-model take."""
    page = console.page
    console.set_number("Max tokens", 160)
    field = page.get_by_label("Latency budget, milliseconds; empty for none")
    page.get_by_role("button", name="full model").click()
    full = float(field.input_value())
    for share in (0.75, 0.9, 1.1, 0.6, 1.3, 1.6):
        field.fill(f"{full * share:.0f}")
        console.ask()
        if page.locator(".answer .badge.good").count() and page.locator(".legend li").count() > 2:
            return


def compare(console: Console) -> None:
    """Three budgets, as the page proposes them."""
    console.page.get_by_role("switch", name="Compare three budgets").check()
    for _ in range(6):
        console.ask()
        if console.page.locator(".answer .badge.good").count() >= 2:
            return


def ladder(console: Console) -> None:
    """One sub-model pinned."""
    console.page.locator("#panel-ladder tbody tr").filter(has_text=MIDDLE).locator("td").last.click()
    console.page.mouse.move(5, 400)


def live(console: Console) -> None:
    """A minute of mixed traffic, which goes on while the picture is taken."""
    url = console.page.url.split("#")[0]
    full = httpx.get(f"{url}v1/submodels", trust_env=False).json()["data"][-1]
    stop = time.monotonic() + TRAFFIC_SECONDS + 5
    for number, share in enumerate((0.6, 1.5, 3.0, 6.0)):
        headers = {"X-Latency-Budget-Ms": f"{full['predicted_tpot_ms'] * 64 * share:.0f}"}
        threading.Thread(target=_ask_until, args=(url, stop, number, headers), daemon=True).start()
    console.page.wait_for_timeout(TRAFFIC_SECONDS * 1e3)


def _ask_until(url: str, stop: float, number: int, headers: dict[str, str]) -> None:
    """A client of its own habits: one budget, and now and then a pause."""
    # the picture is taken under traffic, so the server is stopped under it too
    with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        place = 0
        while time.monotonic() < stop:
            body = {"prompt": PROMPTS[place % len(PROMPTS)], "max_tokens": 32 + 16 * number, "temperature": 0.8}
            client.post("v1/completions", json=body, headers=headers)
            place += 1
            time.sleep((0.2, 0.6, 1.1, 0.4)[(place // 6 + number) % 4])


SHOTS: tuple[tuple[str, str, Callable[[Console], None], str, tuple[int, int]], ...] = (
    ("playground", "playground", playground, "light", (1360, 860)),
    ("compare", "playground", compare, "light", (1440, 940)),
    ("compare-dark", "playground", compare, "dark", (1440, 940)),
    ("ladder", "ladder", ladder, "light", (1280, 1010)),
    ("ladder-dark", "ladder", ladder, "dark", (1280, 1010)),
    ("phone", "playground", playground, "light", (390, 844)),
    ("live", "live", live, "light", (1360, 960)),
)


def main() -> None:
    """Take those named on the command line, else all, and print how large each is."""
    named = set(sys.argv[1:]) or {name for name, *_ in SHOTS}
    path = executable()
    if path is None:
        raise SystemExit("no Chromium on this machine: apt-get install chromium, or name one in $CHROMIUM")
    OUT.mkdir(parents=True, exist_ok=True)
    with serving() as server, chromium(path) as browser:
        for name, view, prepare, scheme, (width, height) in (shot for shot in SHOTS if shot[0] in named):
            with console_page(browser, color_scheme=scheme, viewport={"width": width, "height": height}) as console:
                console.open(server.url, view)
                prepare(console)
                console.page.wait_for_timeout(400)
                file = OUT / f"{name}.png"
                console.page.screenshot(path=file, full_page=name == "phone")
                print(f"{file.name}: {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
