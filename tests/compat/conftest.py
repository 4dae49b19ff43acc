"""Servers and environments of the suite."""

from collections.abc import Iterator

import pytest

from tests.compat.servers import serving
from tests.server.real_server import Server

KEY = "sk-compat"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Without a key; shared by tools that only ask it things."""
    with serving() as started:
        yield started


@pytest.fixture(scope="session")
def keyed_server() -> Iterator[Server]:
    """Asks for the key KEY, and lets two requests wait, so that a few prompts at once are too many."""
    with serving("--api-key", KEY, "--max-queue", "2") as started:
        yield started
