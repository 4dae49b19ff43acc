"""A client for streamed answers that costs little: it runs beside the server it measures, on the same cores.

Keep-alive connections over plain asyncio transports; of a stream only two moments and the last events are kept, and
nothing is parsed while it runs.
"""

import asyncio
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
    """A connection to the server; one answer at a time."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: Callable[[Answer], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, payload: bytes, done: Callable[[Answer], None]) -> None:
        """Send a request; `done` gets its answer when that is complete or broken."""
        assert self._answer is None
        assert self._transport is not None
        self._answer, self._done = Answer(), done
        self._transport.write(payload)

    def data_received(self, data: bytes) -> None:
        """More of the answer."""
        if self._answer is not None and self._answer.take(data, self._pool.now()):
            self._end(reusable=self._answer.headers.get("connection", "").lower() != "close")

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closed it, or we did."""
        self._pool.forget(self)
        if self._answer is not None:
            self._answer.broken = True
            self._end(reusable=False)

    def close(self) -> None:
        """Close at once; what was being answered is broken."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self, *, reusable: bool) -> None:
        answer, done = self._answer, self._done
        self._answer = self._done = None
        if reusable:
            self._pool.put_back(self)
        elif self._transport is not None:
            self._transport.abort()
        assert answer is not None
        assert done is not None
        done(answer)


class Pool:
    """Connections that nobody uses at the moment, last used first; `now` is the clock of the answers."""

    def __init__(self, port: int, now: Callable[[], float]) -> None:
        self.now = now
        self._port = port
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def open(self, number: int) -> None:
        """Make so many connections beforehand."""
        for connection in [await self._connect() for _ in range(number)]:
            self.put_back(connection)

    def take(self) -> Connection | None:
        """An idle connection; None if there is none."""
        return self._idle.pop() if self._idle else None

    async def take_or_connect(self) -> Connection:
        """An idle connection, or a new one. Raises OSError."""
        return self.take() or await self._connect()

    def put_back(self, connection: Connection) -> None:
        """It is idle again."""
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close all of them; answers under way are broken."""
        for connection in list(self._all):
            connection.close()

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self), "127.0.0.1", self._port
        )
        self._all.add(connection)
        return connection
