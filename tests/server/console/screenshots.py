"""Makes docs/screenshots/ again: `python -m tests.server.console.screenshots` with a Chromium on the machine.

A server of the bundled model is started for it, and what is seen is real: its answers, its traffic, its predictions.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.server.console.browser import Console, chromium, console_page, executable
from tests.server.test_bundled import PROMPT, serving

OUT = Path(__file__).resolve().parents[3] / "docs" / "screenshots"
PROMPTS = ("The ship lay at anchor and", "In the morning the old man", "She opened the letter, and", PROMPT)
TRAFFIC_SECONDS = 75  # so that the charts have something to show


def playground(console: Console) -> None:
    """One answer that switches: a budget between what the smallest and the full sub-model take."""
    page = console.page
    console.set_number("Max tokens", 160)
    field = page.get_by_label("Latency budget, milliseconds; empty for none")
    page.get_by_role("button", name="full model").click()
    full = float(field.input_value())
    for share in (0.75, 0.6, 0.9, 0.5):
        field.fill(f"{full * share:.0f}")
        console.ask()
        if page.locator(".answer .badge.good").count() and page.locator(".legend li").count() > 2:
            return


def compare(console: Console) -> None:
    """Three budgets, as the page proposes them."""
    console.page.get_by_role("switch", name="Compare three budgets").check()
    for _ in range(4):
        console.ask()
        if console.page.locator(".answer .badge.good").count() == 3:
            return


def ladder(console: Console) -> None:
    """One sub-model pinned."""
    console.page.locator("#panel-ladder tbody tr").filter(has_text="d4-w50").locator("td").last.click()
    console.page.mouse.move(5, 400)


def live(console: Console) -> None:
    """A minute of mixed traffic."""
    url = console.page.url.split("#")[0]
    stop = time.monotonic() + TRAFFIC_SECONDS
    threads = [threading.Thread(target=_ask_until, args=(url, stop, number)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # the page needs its turn to draw
            console.page.wait_for_timeout(200)


def _ask_until(url: str, stop: float, number: int) -> None:
    """A client of its own habits: a budget, or none; and now and then a pause."""
    budgets = (None, "400", "900", "2500", "1500")
    headers = {} if budgets[number] is None else {"X-Latency-Budget-Ms": str(budgets[number])}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        place = 0
        while time.monotonic() < stop:
            body = {"prompt": PROMPTS[place % len(PROMPTS)], "max_tokens": 48 + 16 * number, "temperature": 0.8}
            client.post("v1/completions", json=body, headers=headers)
            place += 1
            time.sleep((0.2, 0.6, 1.1, 0.4)[(place // 6 + number) % 4])


SHOTS: tuple[tuple[str, str, Callable[[Console], None], str, tuple[int, int]], ...] = (
    ("playground", "playground", playground, "light", (1360, 860)),
    ("compare", "playground", compare, "light", (1440, 860)),
    ("compare-dark", "playground", compare, "dark", (1440, 860)),
    ("ladder", "ladder", ladder, "light", (1280, 1010)),
    ("ladder-dark", "ladder", ladder, "dark", (1280, 1010)),
    ("phone", "playground", playground, "light", (390, 844)),
    ("live", "live", live, "light", (1360, 1000)),
    ("live-dark", "live", live, "dark", (1360, 1000)),
)


def main() -> None:
    """Take them all, and print how large each is."""
    path = executable()
    if path is None:
        raise SystemExit("no Chromium on this machine: apt-get install chromium, or name one in $CHROMIUM")
    OUT.mkdir(parents=True, exist_ok=True)
    with serving() as server, chromium(path) as browser:
        for name, view, prepare, scheme, (width, height) in SHOTS:
            with console_page(browser, color_scheme=scheme, viewport={"width": width, "height": height}) as console:
                console.open(server.url, view)
                prepare(console)
                console.page.wait_for_timeout(400)
                file = OUT / f"{name}.png"
                console.page.screenshot(path=file, full_page=name == "phone")
                print(f"{file.name}: {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
