"""Fixtures that several folders share."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton's kernels run in its interpreter here. It is read when a kernel is defined, so it must be set before anybody's test
# imports one: with some kernels compiled and others interpreted, neither can call the other.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What engines measure at their start is kept for the other tests, not for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
