"""One server of the bundled model and one browser for all tests of the page, and a fresh page for each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.server.test_bundled import Server, serving

try:
    from tests.server.console.browser import Console, chromium, console_page, executable
except ImportError:  # without the test extra
    executable = lambda: None  # type: ignore[assignment]  # noqa: E731

OpenPage = Callable[..., AbstractContextManager["Console"]]


@pytest.fixture(scope="package")
def console_server() -> Iterator[Server]:
    with serving("--served-model-name", "bundled") as started:
        yield started


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e .[test]")
    path = executable()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or name one in $CHROMIUM")
    with chromium(path) as started:
        yield started


@pytest.fixture
def open_page(browser: Any) -> OpenPage:
    """Open a page with a context of your own making."""
    return lambda **context: console_page(browser, **context)


@pytest.fixture
def console(open_page: OpenPage, console_server: Server) -> Iterator["Console"]:
    """The console, ready at the playground. Whatever it complained of by the end of the test fails it."""
    with open_page() as opened:
        opened.open(console_server.url)
        yield opened
        assert opened.complaints == []
