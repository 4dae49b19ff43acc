"""All kernel tests run on one thread; the compiled products are made once."""

import pytest

from sortserve.kernels.compiling import UnavailableError
from sortserve.kernels.native import Native


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    """`one_thread`, without asking."""


@pytest.fixture(scope="session")
def native(own_cache: None) -> Native:
    """Skips where they cannot be compiled or run."""
    try:
        return Native()
    except UnavailableError as error:
        pytest.skip(f"no compiled products here: {error}")
