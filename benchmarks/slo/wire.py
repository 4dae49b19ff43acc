"""What the benchmark and its client process hand each other: what to ask and when, and what came back. Plain data in
MessagePack files; the client imports neither torch nor numpy."""

from typing import Literal

import msgspec


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
    clients: int  # closed loop: so many, each asks again once it is answered; open loop: connections made beforehand
    seconds: float  # closed loop: how long; open loop: how long after the last request answers are waited for
    nice: int  # added to the client's niceness: the server's work comes first


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
