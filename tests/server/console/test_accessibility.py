"""The page for people with a keyboard only, a screen reader, a phone, either theme, or no wish for movement."""

import re
from typing import Any

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e .[test]")

from playwright.sync_api import Page, expect

from tests.bundled import ABOVE_MIDDLE
from tests.server.console.browser import Console
from tests.server.console.conftest import OpenPage
from tests.server.real_server import Server

pytestmark = pytest.mark.slow

VIEWS = ("playground", "compare", "live", "ladder")


def show(console: Console, server: Server, view: str) -> None:
    """A view with something in it."""
    console.open(server.url, view if view != "compare" else "playground")
    if view == "compare":
        console.page.get_by_role("switch", name="Compare three budgets").check()
    if view in ("playground", "compare"):
        console.set_number("Max tokens", 24)
        console.ask()
    if view == "live":
        console.page.locator(".chart canvas").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing(open_page: OpenPage, console_server: Server, view: str, scheme: str) -> None:
    """Roles, names, contrast (4.5 to 1) and the rest of WCAG 2.2 AA that a program can tell."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with open_page(color_scheme=scheme, reduced_motion="reduce") as console:
        show(console, console_server, view)
        found = axe.Axe().run(
            console.page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}
        )
        assert found.response["passes"], "it ran"
        told = [
            (rule["id"], node["html"][:160], node["failureSummary"])
            for rule in found.response["violations"]
            for node in rule["nodes"]
        ]
        assert told == []


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_wider_than_a_phone(open_page: OpenPage, console_server: Server, view: str) -> None:
    with open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as console:
        show(console, console_server, view)
        assert console.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert console.complaints == []


def focused(page: Page) -> str:
    return str(
        page.evaluate("document.activeElement.id || document.activeElement.innerText || document.activeElement.tagName")
    )


def press_until(page: Page, key: str, name: str, most: int = 40) -> None:
    for _ in range(most):
        page.keyboard.press(key)
        if re.search(name, focused(page)):
            return
    raise AssertionError(f"{most} times {key} did not reach {name}")


def test_with_the_keyboard_only(console: Console) -> None:
    """Ask with a budget, compare, look at the ladder and pin: not one click."""
    page = console.page
    press_until(page, "Tab", "^tab-playground$")
    press_until(page, "Tab", "^prompt$")
    page.keyboard.press("Control+A")
    page.keyboard.type("A ship")
    press_until(page, "Tab", "^max-tokens$")
    page.keyboard.press("Control+A")
    page.keyboard.type("12")
    press_until(page, "Tab", "^budget$")
    assert page.locator("#budget").get_attribute("aria-valuetext") == "no budget"
    page.keyboard.press("ArrowLeft")
    assert re.match(r"[\d.]+ m?s", page.locator("#budget").get_attribute("aria-valuetext") or "")
    press_until(page, "Tab", "^Ask")
    page.keyboard.press("Enter")
    page.locator(".facts").wait_for()
    assert console.requests[0]["body"]["prompt"] == "A ship"
    assert float(console.requests[0]["headers"]["x-latency-budget-ms"]) > 0

    press_until(page, "Shift+Tab", "^prompt$")
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        "() => document.querySelector('.playground > [role=status]').innerText.includes('12 tokens')"
    )
    press_until(page, "Shift+Tab", "^tab-playground$")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Live")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tab", name="Live")).to_be_focused()
    page.keyboard.press("End")
    expect(page.locator("#panel-ladder")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel-playground")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    press_until(page, "Tab", f"^{ABOVE_MIDDLE}$", 60)
    page.keyboard.press("Enter")
    expect(page.locator("tr.pinned")).to_contain_text(ABOVE_MIDDLE)


def test_escape_stops(console: Console) -> None:
    page = console.page
    console.set_number("Max tokens", 1000)
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    page.locator(".answer-text .token").first.wait_for()
    page.keyboard.press("Escape")
    expect(page.locator(".answer .badge")).to_have_text("stopped")


def test_focus_is_seen(console: Console) -> None:
    """Every stop of the tab order has an outline, on itself or on what stands for it."""
    page = console.page
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                """() => {
              const element = document.activeElement;
              const shown = [element, element.nextElementSibling].filter(Boolean).map((one) => getComputedStyle(one));
              const outlined = ({ outlineStyle, outlineWidth }) => outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
              return [element.outerHTML.slice(0, 90), shown.some(outlined)];
            }"""
            )
        )
    assert [html for html, outlined in seen if not outlined] == []


def test_the_end_is_announced_and_the_tokens_are_not(console: Console) -> None:
    page = console.page
    page.evaluate(
        """() => {
          window.announced = [];
          const watched = document.querySelector(".playground > [role=status]");
          const said = new MutationObserver(() => window.announced.push(watched.innerText));
          said.observe(watched, { childList: true, characterData: true, subtree: true });
        }"""
    )
    console.set_number("Max tokens", 64)
    console.ask()
    page.wait_for_function("() => window.announced.some((text) => text.includes('64 tokens in'))")
    announced: list[Any] = page.evaluate("window.announced")
    assert len(announced) <= 4, announced
    assert (
        page.locator(".answer-text").evaluate("text => text.closest('[aria-live], [role=status], [role=log]')") is None
    )


def test_no_movement_for_who_wants_none(open_page: OpenPage, console_server: Server) -> None:
    with open_page(reduced_motion="reduce") as console:
        console.open(console_server.url)
        moving = console.page.evaluate(
            "() => [...document.querySelectorAll('*')].filter((e) => { const s = getComputedStyle(e);"
            " return s.animationName !== 'none' || s.transitionDuration.split(',').some((t) => parseFloat(t) > 0) }).length"
        )
        assert moving == 0


def test_the_theme_follows_the_system(open_page: OpenPage, console_server: Server) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        with open_page(color_scheme=scheme) as console:
            console.open(console_server.url)
            grounds[scheme] = console.page.evaluate(
                "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
            )
            assert console.complaints == []
    assert min(grounds["light"]) > 200
    assert max(grounds["dark"]) < 60
