"""Server-sent events: framing, and a response that ends the work behind it when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sortserve.server.streams import ClientGoneError, gone

DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One event of JSON."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStreamResponse(Response):
    """Sends what a generator yields; closes it and calls `on_close` however it ends.

    Starlette's own StreamingResponse leaves the generator to the garbage collector when it is cancelled while sending,
    so a client that leaves would keep its slot and pages until then.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], headers: Mapping[str, str], on_close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["Cache-Control"] = "no-store"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold the stream back
        self._chunks = chunks
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises ClientGoneError when the client closed the connection."""
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientGoneError
            sending.result()
        finally:
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            await self._chunks.aclose()
            await self._on_close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
