"""The live view in a browser: numbers that move with the traffic, and a server that goes away and comes back."""

import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e .[test]")

from playwright.sync_api import Page, Route, expect

from tests.bundled import FLOOR, FULL, MIDDLE
from tests.server.console.browser import PATIENCE_MS, Console
from tests.server.console.conftest import OpenPage
from tests.server.real_server import Server, serving
from tests.server.test_bundled import PROMPT

pytestmark = pytest.mark.slow

MET = "Budgets met, and quality"


def number(page: Page, metric: str) -> float | None:
    """The first number of a panel; None while there is none."""
    found = re.search(r"[\d,.]+", page.locator(f"[data-metric='{metric}']").inner_text())
    return float(found[0].replace(",", "")) if found else None


def until(page: Page, holds: Callable[[], bool]) -> None:
    """Wait for the page's next scrapes until something holds."""
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while not holds():
        assert time.monotonic() < deadline, page.locator(".live").inner_text()
        page.wait_for_timeout(200)


def traffic(url: str, budget: str = "60000", requests: int = 12) -> None:
    """A few answers by three sub-models."""

    def ask(place: int) -> None:
        body = {"prompt": f"{PROMPT} {place}", "max_tokens": 24, "submodel": (FLOOR, MIDDLE, FULL)[place % 3]}
        httpx.post(f"{url}/v1/completions", json=body, headers={"X-Latency-Budget-Ms": budget}, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(requests)))


def test_numbers_move_with_the_traffic(console: Console, console_server: Server) -> None:
    page = console.page
    page.get_by_role("tab", name="Live").click()
    page.locator(".live").wait_for()
    traffic(console_server.url)
    until(page, lambda: (number(page, "tokens") or 0) > 0 and (number(page, MET) or 0) > 0)
    until(page, lambda: (number(page, "requests") or 0) > 0)
    until(page, lambda: 0 < (number(page, "Time to first token") or 0) < 60_000)
    until(page, lambda: 0 < (number(page, "Time per output token") or 0) < 60_000)

    def told(kind: str) -> set[str]:
        legend = page.get_by_label(re.compile(f"^{kind} by sub-model, ")).last.inner_text()
        return set(re.findall(r"d\d+[-w\d]*", legend))

    for kind in ("Output tokens", "Requests"):  # the scrape may have come before the last answer
        until(page, lambda kind=kind: {FLOOR, MIDDLE, FULL} <= told(kind))  # type: ignore[misc]
    until(page, lambda: 0 < (number(page, "Goodput") or 0) < 12)

    def readings() -> tuple[str, str]:
        met, quality = page.locator(f"[data-metric='{MET}'] .reading").all_inner_texts()
        return met, quality

    assert ("met" in readings()[0], "quality" in readings()[1]) == (True, True)
    # a third of the answers each by floor, middle and full model, and others' requests may have come before
    until(page, lambda: 70 < float(re.findall(r"[\d.]+", readings()[1])[0]) < 100)
    attained = number(page, MET)
    traffic(console_server.url, budget="0.1", requests=24)
    until(page, lambda: (number(page, MET) or 0) < (attained or 0))
    total = page.locator(".totals div").filter(has_text="Output tokens").locator("dd")
    until(page, lambda: int(total.inner_text().replace(",", "")) >= 24 * 24)


def test_the_charts_are_drawn(console: Console, console_server: Server) -> None:
    page = console.page
    page.get_by_role("tab", name="Live").click()
    page.locator(".live").wait_for()
    traffic(console_server.url, requests=6)
    until(page, lambda: (number(page, "tokens") or 0) > 0)
    charts = page.get_by_role("img")
    expect(page.locator(".chart canvas")).to_have_count(8)
    assert "tokens/s" in (charts.first.get_attribute("aria-label") or "")
    # the stacked area of the first chart has coloured pixels, and they are not one shade of grey
    # (read from a copy: Chromium complains of a canvas that is read twice and was not made for it)
    count = """(canvas) => {
          const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
          copy.drawImage(canvas, 0, 0);
          const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
          let coloured = 0;
          for (let at = 0; at < data.length; at += 4) {
            const rgb = data.slice(at, at + 3);
            coloured += data[at + 3] > 0 && Math.max(...rgb) - Math.min(...rgb) > 60;
          }
          return coloured;
        }"""
    until(page, lambda: page.locator(".chart canvas").first.evaluate(count) > 20)


def test_the_window_can_be_changed_and_the_past_looked_at(console: Console, console_server: Server) -> None:
    page = console.page
    page.get_by_role("tab", name="Live").click()
    page.get_by_role("button", name="10 s").click()
    expect(page.locator(".live-head .hint")).to_contain_text("10 s")
    expect(page.locator(".live-head .hint")).to_contain_text("Now")
    over = page.locator(".chart .u-over").first
    over.wait_for()

    def looked_at() -> bool:
        box = over.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] - 6, box["y"] + 20)  # a movement each time: nothing may be drawn yet
        page.mouse.move(box["x"] + box["width"] - 4, box["y"] + 20)
        return re.search(r"At \d\d:\d\d:\d\d", page.locator(".live-head .hint").inner_text()) is not None

    until(page, looked_at)
    page.mouse.move(5, 5)
    expect(page.locator(".live-head .hint")).to_contain_text("Now")


def test_the_server_goes_away_and_another_one_comes(open_page: OpenPage) -> None:
    """Its counters start anew: no rate below zero, and none of thousands of tokens a second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with open_page() as console:
        page = console.page
        with serving("--port", port) as first:
            console.open(first.url, "live")
            traffic(first.url)
            until(page, lambda: (number(page, "tokens") or 0) > 0)
        expect(page.locator(".phase")).to_have_text("not reachable")
        expect(page.locator(".notice")).to_contain_text("cannot be reached")
        assert "\N{EN DASH}" in page.locator("[data-metric='tokens']").inner_text()
        with serving("--port", port) as second:
            expect(page.locator(".phase")).to_have_text("ready")
            expect(page.locator(".notice")).to_have_count(0)
            traffic(second.url, requests=3)
            # the scrape that tells of the first tokens may come before the last request has ended
            expect(page.locator(".totals dd").first).to_have_text("3")
            until(page, lambda: (number(page, "tokens") or 0) > 0)
            assert 0 < (number(page, "tokens") or 0) <= 36 * 24
        assert [text for text in console.complaints if "ERR_" not in text and "503" not in text] == []


@pytest.mark.parametrize(
    ("code", "message", "shown"),
    [
        ("loading", "the model is still loading", "loading"),
        ("engine_failed", "the engine is being restarted", "restarting"),
        ("draining", "the server is shutting down", "shutting down"),
    ],
)
def test_why_it_is_not_ready(open_page: OpenPage, console_server: Server, code: str, message: str, shown: str) -> None:
    def not_ready(route: Route) -> None:
        error = {"message": message, "type": "server_error", "param": None, "code": code}
        route.fulfill(status=503, json={"error": error})

    def metrics(route: Route) -> None:
        text = httpx.get(f"{console_server.url}/metrics").text
        route.fulfill(
            body=text.replace(
                'sortserve_model_ready{model="bundled"} 1.0', 'sortserve_model_ready{model="bundled"} 0.0'
            )
        )

    with open_page() as console:
        console.open(console_server.url)
        console.page.route("**/ready", not_ready)
        console.page.route("**/metrics", metrics)
        expect(console.page.locator(".phase")).to_have_text(shown)
        expect(console.page.locator(".notice")).to_contain_text(message)
        expect(console.page.get_by_role("button", name="Ask")).to_be_disabled()
        console.page.unroute_all()
        expect(console.page.locator(".phase")).to_have_text("ready")
        expect(console.page.get_by_role("button", name="Ask")).to_be_enabled()
