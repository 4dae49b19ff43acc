"""All kernel tests run on one thread."""

import pytest

from tests.kernels.closeness import one_thread

_one_thread = pytest.fixture(autouse=True)(one_thread)
