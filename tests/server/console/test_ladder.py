"""The ladder in a browser: the table, the picture, and a pin that reaches the request."""

import re

import httpx
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e .[test]")

from playwright.sync_api import Route, expect

from tests.bundled import LADDER, MIDDLE
from tests.server.console.browser import Console
from tests.server.console.conftest import OpenPage
from tests.server.real_server import Server

pytestmark = pytest.mark.slow


def test_every_submodel_is_in_the_table_and_in_the_picture(console: Console, console_server: Server) -> None:
    page = console.page
    page.get_by_role("tab", name="Ladder").click()
    listed = httpx.get(f"{console_server.url}/v1/submodels").json()["data"]
    rows = page.locator("#panel-ladder tbody tr")
    expect(rows).to_have_count(len(LADDER))
    for row, entry in zip(rows.all_inner_texts(), listed, strict=True):
        assert entry["id"] in row
        assert f"{entry['quality']['value']:.3f}" in row
        assert f"{entry['width']} (" in row
    points = page.locator(".scatter .point")
    expect(points).to_have_count(len(LADDER))
    xs = [float(point.get_attribute("cx") or 0) for point in page.locator(".scatter .dot").all()]
    ys = [float(point.get_attribute("cy") or 0) for point in page.locator(".scatter .dot").all()]
    assert ys == sorted(ys, reverse=True), "better is higher up"
    assert xs[0] < xs[-1], "the full model takes longest"


def test_a_pin_reaches_the_request(console: Console) -> None:
    page = console.page
    page.get_by_role("tab", name="Ladder").click()
    page.locator("#panel-ladder tbody tr").filter(has_text=MIDDLE).locator("td").last.click()
    expect(page.get_by_role("button", name=f"Pin {MIDDLE}")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".point.pinned title")).to_have_text(re.compile(f"^{MIDDLE}"))
    page.get_by_role("tab", name="Playground").click()
    expect(page.locator(".pin")).to_contain_text(f"{MIDDLE} pinned")
    expect(page.get_by_label("Smallest sub-model accepted")).to_have_count(0)
    console.ask()
    assert console.requests[-1]["headers"]["x-submodel"] == MIDDLE
    assert page.locator(".answer-text .token").first.get_attribute("data-submodel") == MIDDLE

    page.get_by_role("button", name="Unpin").click()
    console.ask()
    assert "x-submodel" not in console.requests[-1]["headers"]


def test_a_pin_by_keyboard_in_the_picture(console: Console) -> None:
    page = console.page
    page.get_by_role("tab", name="Ladder").click()
    point = page.locator(".scatter .point").nth(1)
    point.focus()
    page.keyboard.press("Enter")
    expect(point).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name=f"Pin {LADDER[1]}")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Space")
    expect(point).to_have_attribute("aria-pressed", "false")
    expect(page.locator("tr.pinned")).to_have_count(0)


def test_quality_that_was_not_measured_is_said_to_be_so(open_page: OpenPage, console_server: Server) -> None:
    listed = httpx.get(f"{console_server.url}/v1/submodels").json()
    keep = {"some": 3, "none": 0}
    for left in keep.values():
        for place, entry in enumerate(listed["data"]):
            entry["quality"] = entry["quality"] if place < left else None

        def unmeasured(route: Route) -> None:
            route.fulfill(json=listed)

        with open_page() as console:
            console.page.route("**/v1/submodels", unmeasured)
            console.open(console_server.url, "ladder")
            hint = console.page.locator("#panel-ladder .hint")
            some = f"{len(LADDER) - left} of {len(LADDER)} are not measured"
            expect(hint).to_contain_text(some if left else "No quality has been measured")
            expect(console.page.locator("tbody tr").last).to_contain_text("not measured")
            expect(console.page.locator(".scatter .point")).to_have_count(len(LADDER))
            assert "NaN" not in console.page.locator(".scatter svg").inner_html()
            assert console.complaints == []
