"""Headless Chromium of this machine, driven by Playwright, and pages that keep account of what went wrong on them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000
_WATCH_POLICY = """
  addEventListener("securitypolicyviolation", (event) => {
    console.error(`policy violation: ${event.violatedDirective} by ${event.blockedURI || event.sourceFile}`);
  });
"""


def executable() -> str | None:
    """Where a Chromium is, if there is one: $CHROMIUM, or on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """A browser without a window."""
    # a proxy in the environment is no way to 127.0.0.1
    env: dict[str, str | float | bool] = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    expect.set_options(timeout=30_000)  # no expectation is a timed one: the machine may be busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS), env=env)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Console:
    """The console in a page of its own. `complaints`: console errors and warnings, exceptions, policy violations."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)  # each POST: url, headers, body

    def open(self, url: str, view: str = "playground") -> None:
        """Load the page at a view, and wait until it knows the ladder."""
        self.page.goto(f"{url}/#{view}")
        self.page.locator(".phase.ready").wait_for()
        self.page.locator("#panel-ladder tbody tr").first.wait_for(state="attached")

    def ask(self) -> None:
        """Send the request and wait until every answer has ended."""
        self.page.get_by_role("button", name="Ask").click()
        self.page.locator(".answer .facts").first.wait_for()
        self.page.get_by_role("button", name="Ask").wait_for()

    def set_number(self, label: str, value: object) -> None:
        """Fill one of the number fields."""
        self.page.get_by_label(label, exact=True).fill(str(value))


@contextmanager
def console_page(browser: Browser, **context: Any) -> Iterator[Console]:
    """A fresh page; `context` as Playwright's new_context takes it (color_scheme, viewport, reduced_motion, ...)."""
    opened = browser.new_context(**({"viewport": {"width": 1360, "height": 900}} | context))
    opened.set_default_timeout(PATIENCE_MS)
    opened.add_init_script(_WATCH_POLICY)
    page = opened.new_page()
    console = Console(page)
    page.on("console", lambda message: _note(console, message.type, message.text))
    page.on("pageerror", lambda error: console.complaints.append(str(error)))
    page.on("request", lambda request: _keep(console, request))
    try:
        yield console
    finally:
        opened.close()


def _note(console: Console, kind: str, text: str) -> None:
    if kind in ("error", "warning"):
        console.complaints.append(text)


def _keep(console: Console, request: Any) -> None:
    if request.method == "POST":
        console.requests.append({"url": request.url, "headers": request.headers, "body": request.post_data_json})
