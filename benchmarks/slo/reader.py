"""The reading half of the open loop: `python -m benchmarks.slo.reader FD PLAN OUTCOMES`. It gives way to the server.

Over the socket FD it is told the start of the clock, then each request that was sent, with its connection.
"""

import asyncio
import gc
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.slo.http_client import Answer, Connection
from benchmarks.slo.priority import give_way
from benchmarks.slo.wire import Ask, Outcome, Plan, kept

BEGINS = struct.Struct("=d")  # when the replay begins, on the monotonic clock
SENT = struct.Struct("=Id")  # number of the request, and when it was sent, in seconds from the start


class Reader:
    """Takes connections from the channel, and keeps what comes back."""

    def __init__(self, plan: Plan, channel: socket.socket) -> None:
        self.outcomes: list[Outcome] = []
        self._plan = plan
        self._channel = channel
        self._asks = {ask.number: ask for ask in plan.asks}
        self._began = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[int, Connection] = {}

    def now(self) -> float:
        """Seconds from the start."""
        return time.monotonic() - self._began

    async def run(self) -> list[Outcome]:
        """Until all is answered, `plan.seconds` after the last request was due at most: the rest is given up."""
        loop = asyncio.get_running_loop()
        self._channel.setblocking(False)
        await loop.sock_sendall(self._channel, b"!")  # ready
        [self._began] = BEGINS.unpack(await loop.sock_recv(self._channel, BEGINS.size))
        loop.add_reader(self._channel, self._take)
        last = max((ask.due for ask in self._plan.asks), default=0.0)
        while self.now() < last + self._plan.seconds and len(self.outcomes) < len(self._plan.asks):
            await asyncio.sleep(0.05)
        loop.remove_reader(self._channel)
        self._channel.close()
        await asyncio.gather(*self._tasks)
        for connection in list(self._connections.values()):
            connection.close()
        await asyncio.sleep(0)  # what was under way is told as broken now
        known = {outcome.number for outcome in self.outcomes}
        never = [kept(ask, ask.due, None) for number, ask in self._asks.items() if number not in known]
        return self.outcomes + never  # the sender was stuck: never sent

    def _take(self) -> None:
        """Everything that the sender has told by now."""
        while True:
            try:
                message, files, _, _ = socket.recv_fds(self._channel, SENT.size, 1)
            except BlockingIOError:
                return
            if not message:  # all is sent
                asyncio.get_running_loop().remove_reader(self._channel)
                return
            number, sent = SENT.unpack(message)
            ask = self._asks[number]
            if not files:
                self.outcomes.append(kept(ask, sent, None))
                continue
            task = asyncio.get_running_loop().create_task(self._adopt(ask, sent, files[0]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _adopt(self, ask: Ask, sent: float, file: int) -> None:
        """Wait for the answer over this connection."""

        def done(answer: Answer) -> None:
            self.outcomes.append(kept(ask, sent, answer))
            self._connections.pop(ask.number).close()

        connection = self._connections[ask.number] = Connection(self.now, done)
        await connection.over(socket.socket(fileno=file))


def main() -> None:
    """Read the plan, give way, read, write the outcomes."""
    plan = msgspec.msgpack.decode(Path(sys.argv[2]).read_bytes(), type=Plan)
    give_way(plan.nice)
    gc.collect()
    gc.freeze()
    gc.disable()
    channel = socket.socket(fileno=int(sys.argv[1]))
    Path(sys.argv[3]).write_bytes(msgspec.msgpack.encode(asyncio.run(Reader(plan, channel).run())))


if __name__ == "__main__":
    main()
