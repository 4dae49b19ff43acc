"""Clients of an app over the fake back end."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.server.fake_backend import FakeBackend, open_client


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(backend) as opened:
        yield opened
