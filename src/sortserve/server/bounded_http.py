"""uvicorn's HTTP/1.1 connection with bounds on the head of a request, which its fast parser does not set.

Without them a client could send header lines for ever, each kept in memory, or none at all and hold the connection.
"""

import asyncio
import uuid
from typing import Any, cast

import httptools
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from sortserve.engine.errors import SortServeError
from sortserve.server.errors import HeadersTooLargeError, InvalidHttpError, ReadTimeoutError, error_response


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. What is no HTTP is answered in the contract's shape too, and the connection closed."""

    max_head_bytes = 64 * 1024  # request line and headers, as nginx (4 x 8 KiB) and h11 (64 KiB) have it
    max_headers = 128
    head_seconds = 60.0  # from the first byte (or the connection) to the end of the headers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_head_bytes = 0
        self._refusal: SortServeError | None = None
        self._head_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request has its time from here."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No time-out after the end."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head that has no end yet are counted here: the parser hands a header on only when it is whole."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._num_head_bytes += len(data)
            if self._num_head_bytes > self.max_head_bytes:
                self._refuse(_too_large(self.max_head_bytes, self.max_headers))

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._num_head_bytes = 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        """A head ends. Raises, out of the parser's call, for one over the limits."""
        self._head_is_there()
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > self.max_head_bytes or len(self.headers) > self.max_headers:
            self._refusal = _too_large(self.max_head_bytes, self.max_headers)
            raise httptools.HttpParserError(self._refusal.message)
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Called when the parser raised."""
        self._refuse(self._refusal or InvalidHttpError("this is no HTTP/1.1 request"))

    @property
    def _answering(self) -> bool:
        cycle = cast(RequestResponseCycle | None, self.cycle)  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _expect_head(self) -> None:
        self._head_is_there()
        self._in_head = True
        self._head_timeout = self.loop.call_later(self.head_seconds, self._on_head_timeout)

    def _head_is_there(self) -> None:
        self._in_head = False
        if self._head_timeout is not None:
            self._head_timeout.cancel()
            self._head_timeout = None

    def _on_head_timeout(self) -> None:
        if self._answering:
            self._expect_head()  # the answer before it is still on its way
        elif self._num_head_bytes:
            self._refuse(ReadTimeoutError(f"the headers did not end within {self.head_seconds:g} s; send them at once"))
        else:
            self.transport.close()  # nothing was asked

    def _refuse(self, error: SortServeError) -> None:
        """Answer and close; behind an answer that is on its way, only close: it would be taken for a part of it."""
        if not self._answering:
            self.transport.write(_bytes_of(error_response(error)))
        self.transport.close()


def _too_large(max_bytes: int, max_headers: int) -> SortServeError:
    return HeadersTooLargeError(
        f"the request line and headers are over the limit of {max_bytes} bytes or {max_headers} headers; send fewer"
    )


def _bytes_of(response: Response) -> bytes:
    """An HTTP/1.1 response that ends its connection."""
    response.headers["X-Request-Id"] = f"req-{uuid.uuid4().hex}"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    response.headers["Connection"] = "close"
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return STATUS_LINE[response.status_code] + lines + b"\r\n" + bytes(response.body)
