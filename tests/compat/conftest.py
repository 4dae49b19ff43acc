"""Servers and environments of the suite."""

from collections.abc import Iterator

import pytest

from tests.compat.servers import Server, serving

KEY = "sk-compat"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without a key; shared by tools that only ask it things."""
    with serving(tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Asks for the key KEY, and lets two requests wait, so that a few prompts at once are too many."""
    with serving(tmp_path_factory.mktemp("keyed") / "log", "--api-key", KEY, "--max-queue", "2") as started:
        yield started
