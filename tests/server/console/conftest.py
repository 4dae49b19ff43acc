"""One server of the bundled model and one browser for all tests of the page, and a fresh page for each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.real_server import Server, serving

if TYPE_CHECKING:
    from tests.server.console.browser import Console

OpenPage = Callable[..., AbstractContextManager["Console"]]


@pytest.fixture(scope="package")
def console_server() -> Iterator[Server]:
    with serving("--served-model-name", "bundled") as started:
        yield started


# not longer than a module: while it is open a loop runs in this thread, and asynchronous tests elsewhere need it
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e .[test]")
    from tests.server.console.browser import chromium, executable

    path = executable()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or name one in $CHROMIUM")
    with chromium(path) as started:
        yield started


@pytest.fixture
def open_page(browser: Any) -> OpenPage:
    """Open a page with a context of your own making."""
    from tests.server.console.browser import console_page

    return lambda **context: console_page(browser, **context)


@pytest.fixture
def console(open_page: OpenPage, console_server: Server) -> Iterator["Console"]:
    """The console, ready at the playground. Whatever it complained of by the end of the test fails it."""
    with open_page() as opened:
        opened.open(console_server.url)
        yield opened
        assert opened.complaints == []
