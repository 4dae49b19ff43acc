"""Toy models on one thread."""

import pytest


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    """`one_thread`, without asking."""
