"""A client for streamed answers that costs little: it runs beside the server it measures, on the same cores.

Plain asyncio transports; of a stream only two moments and the last events are kept, and nothing is parsed while it runs.
"""

import asyncio
import socket
from collections.abc import Callable

_TAIL_BYTES = 2048  # holds the last events: finish reason, usage with the `sortserve` object, [DONE]
_STREAM_END = b"\r\n0\r\n\r\n"
_FIRST, _LAST = b"data: {", b'"finish_reason":"'


class Answer:
    """One response as its bytes come in: moments of the first and last text, on the caller's clock."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.first: float | None = None
        self.last: float | None = None
        self.broken = False
        self._body = bytearray()
        self._length: int | None = None  # of the body; None: chunked, or not known yet

    @property
    def tail(self) -> bytes:
        """The end of the body."""
        return bytes(self._body[-_TAIL_BYTES:])

    def take(self, data: bytes, now: float) -> bool:
        """More bytes; whether the answer is complete."""
        looked_at = len(self._body)
        self._body += data
        if not self.status and not self._take_head():
            return False
        if self._length is not None:
            return len(self._body) >= self._length
        # a mark may have been cut in two by the network
        if self.first is None and self._body.find(_FIRST, max(0, looked_at - len(_FIRST))) >= 0:
            self.first = now
        if self.last is None and self._body.find(_LAST, max(0, looked_at - len(_LAST))) >= 0:
            self.last = now
        return self._body.endswith(_STREAM_END)

    def _take_head(self) -> bool:
        """Read status and headers once they are there; the body is then what is left."""
        end = self._body.find(b"\r\n\r\n")
        if end < 0:
            return False
        status, *lines = self._body[:end].decode("latin-1").split("\r\n")
        self.status = int(status.split()[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        length = self.headers.get("content-length")
        self._length = None if length is None else int(length)
        del self._body[: end + 2]  # leaves one line end, so that an empty stream ends as every other does
        if self._length is not None:
            self._length += 2
        return True


class Connection(asyncio.Protocol):
    """A connection to the server that waits for one answer at a time: at once if it is made with a `done`. `now`: the
    clock of the answers."""

    def __init__(self, now: Callable[[], float], done: Callable[[Answer], None] | None = None) -> None:
        self._now = now
        self._transport: asyncio.Transport | None = None
        self._done = done
        self._answer = None if done is None else Answer()

    @classmethod
    async def to(cls, port: int, now: Callable[[], float]) -> "Connection":
        """A new connection to 127.0.0.1. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(now), "127.0.0.1", port)
        return connection

    async def over(self, given: socket.socket) -> None:
        """Go on with a connected socket, on which a request was sent: `done` gets its answer, complete or broken."""
        given.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=given)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, payload: bytes, done: Callable[[Answer], None]) -> None:
        """Send a request; `done` gets its answer, complete or broken."""
        assert self._answer is None
        assert self._transport is not None
        self._answer, self._done = Answer(), done
        if self._transport.is_closing():
            self._end(broken=True)
        else:
            self._transport.write(payload)

    def data_received(self, data: bytes) -> None:
        """More of the answer."""
        if self._answer is not None and self._answer.take(data, self._now()):
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closed it, or we did."""
        if self._answer is not None:
            self._end(broken=True)

    def close(self) -> None:
        """Close at once; what was being answered is broken."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self, *, broken: bool = False) -> None:
        answer, done = self._answer, self._done
        self._answer = self._done = None
        assert answer is not None
        assert done is not None
        answer.broken = broken
        done(answer)
