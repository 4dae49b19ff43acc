"""Clients of an app over the fake back end."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import pytest

from sortserve.server.app import create_app
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, byte_tokenizer

Open = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def open_client(
    backend: FakeBackend, options: ServerOptions | None = None, loaded: bool = True, template: str | None = "default"
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a loaded app, without a socket between them."""
    tokenizer = byte_tokenizer() if template == "default" else byte_tokenizer(template)
    app = create_app(backend, tokenizer, options)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        if loaded:
            while app.state.server.phase == "loading":
                await _tick()
        client.app_state = app.state.server  # type: ignore[attr-defined]
        yield client


async def _tick() -> None:
    import asyncio

    await asyncio.sleep(0)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(backend) as opened:
        yield opened
