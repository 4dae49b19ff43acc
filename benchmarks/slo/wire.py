"""What the benchmark and its client process hand each other: what to ask and when, and what came back. Plain data in
MessagePack files; the client imports neither torch nor numpy."""

from typing import Literal

import msgspec

from benchmarks.slo.http_client import Answer


class Ask(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request, as the bytes that go out."""

    number: int
    due: float  # seconds from the start; of no meaning in a closed loop
    payload: bytes  # head and body


class Plan(msgspec.Struct, frozen=True):
    """What a client process has to do."""

    port: int  # at 127.0.0.1
    asks: list[Ask]
    loop: Literal["open", "closed"]
    clients: int  # closed loop: so many, each asks again once it is answered
    seconds: float  # closed loop: how long; open loop: how long after the last request answers are waited for
    nice: int  # added to the niceness of whoever reads: the server's work comes first


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one request. Seconds from the start; -1 where it did not happen."""

    number: int
    due: float
    sent: float  # when the request was handed to the system
    first: float  # first chunk with text
    last: float  # the chunk that ends the answer
    status: int  # 0: no answer, or a connection that broke before its end
    headers: dict[str, str]  # lower-case names
    tail: bytes  # the end of the body: last events of a stream, or an error

    @property
    def complete(self) -> bool:
        """Whether the whole answer came."""
        return self.status == 200 and self.last >= 0


def kept(ask: Ask, sent: float, answer: Answer | None) -> Outcome:
    """What is kept of one request; `answer` None: it was never asked."""
    if answer is None:
        return Outcome(ask.number, ask.due, sent, -1.0, -1.0, 0, {}, b"")
    first = -1.0 if answer.first is None else answer.first
    last = -1.0 if answer.last is None or answer.broken else answer.last
    status = 0 if answer.broken else answer.status
    return Outcome(ask.number, ask.due, sent, first, last, status, answer.headers, answer.tail)
