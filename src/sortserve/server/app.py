"""The HTTP app: `create_app(backend, tokenizer, options)`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import sortserve
from sortserve.engine.protocol import Backend
from sortserve.engine.text import Tokenizer
from sortserve.server.console import console_routes
from sortserve.server.context import EXPOSED_HEADERS, ContextMiddleware
from sortserve.server.errors import install_error_handlers
from sortserve.server.openapi import install_openapi
from sortserve.server.routes import generation_routes, model_routes, operation_routes
from sortserve.server.state import ServerOptions, ServerState

if TYPE_CHECKING:
    from sortserve.server.tracing import Tracing  # needs the `otel` extra


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    options: ServerOptions | None = None,
    on_startup_failure: Callable[[], None] | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """An app that answers at once and starts `backend` in the background; `/ready` tells when it is there.

    `app.state.server` is the ServerState. `on_startup_failure` is called when the back end cannot start; the reason is
    in `app.state.server.failure` then. `tracing` is closed with the app. Raises KeysFileError.
    """
    state = ServerState(backend, tokenizer, options or ServerOptions(), on_startup_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(state.load())
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await state.drain()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    # no /docs: its page loads scripts from other sites
    app = FastAPI(title="SortServe", version=sortserve.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # a 307 would be an answer that is neither 2xx nor an error object
    app.state.server = state
    install_error_handlers(app)
    for routes in (generation_routes, model_routes, operation_routes):
        app.include_router(routes(state))
    app.include_router(console_routes())
    install_openapi(app, state)
    app.add_middleware(ContextMiddleware, state=state, tracing=tracing)
    if state.options.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(state.options.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app
