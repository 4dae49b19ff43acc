"""The client's processes: `python -m benchmarks.slo.client PLAN OUTCOMES`, both MessagePack files of `wire.py`.

Open loop: requests leave when they are due, however many are unanswered, and how late each left is kept: a client that
waits for its server hides the queue it stands in. Two processes: this one only sends, at the priority it was given, in
short slices, and hands each connection to a reader that gives way to the server. (One process that did both sent 1 % of
its requests 5 to 27 ms late at 63 requests a second: it was reading.)
Closed loop: so many clients, each as fast as it is answered.
"""

import asyncio
import gc
import itertools
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.slo.http_client import Answer, Connection
from benchmarks.slo.priority import give_way
from benchmarks.slo.reader import BEGINS, SENT
from benchmarks.slo.wire import Outcome, Plan, kept

_LEAD_SECONDS = 0.25  # between the reader being ready and the first request being due
_CONNECT_SECONDS = 5.0


def send(plan: Plan, channel: socket.socket) -> None:
    """Send every request when it is due, over a connection of its own that goes to the reader at the other end of
    `channel`, once that has said that it is ready."""
    channel.recv(1)
    began = time.monotonic() + _LEAD_SECONDS
    channel.send(BEGINS.pack(began))
    for ask in sorted(plan.asks, key=lambda ask: ask.due):
        wait = began + ask.due - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        try:
            with socket.create_connection(("127.0.0.1", plan.port), _CONNECT_SECONDS) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(ask.payload)
                message = SENT.pack(ask.number, time.monotonic() - began)
                socket.send_fds(channel, [message], [connection.fileno()])
        except OSError:
            channel.send(SENT.pack(ask.number, time.monotonic() - began))  # without a connection: broken
    channel.close()


async def closed_loop(plan: Plan) -> list[Outcome]:
    """Clients that ask one after another, round and round the plan's requests, until the time is over."""
    outcomes: list[Outcome] = []
    began = time.monotonic()
    asks = itertools.cycle(plan.asks)

    def now() -> float:
        return time.monotonic() - began

    def ask_next(connection: Connection) -> None:
        ask, sent = next(asks), now()

        def done(answer: Answer) -> None:
            outcomes.append(kept(ask, sent, answer))
            if not answer.broken and now() < plan.seconds:
                ask_next(connection)

        connection.ask(ask.payload, done)

    connections = [await Connection.to(plan.port, now) for _ in range(plan.clients)]
    for connection in connections:
        ask_next(connection)
    await asyncio.sleep(plan.seconds)
    for connection in connections:
        connection.close()
    await asyncio.sleep(0)  # what was under way is told as broken now
    return outcomes


def main() -> None:
    """Read the plan, run it, write the outcomes."""
    plan_file, outcomes_file = map(Path, sys.argv[1:])
    plan = msgspec.msgpack.decode(plan_file.read_bytes(), type=Plan)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection of all that was read takes longer than a request may be late
    if plan.loop == "closed":
        give_way(plan.nice)
        outcomes_file.write_bytes(msgspec.msgpack.encode(asyncio.run(closed_loop(plan))))
        return
    give_way(0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "benchmarks.slo.reader", str(theirs.fileno()), *map(str, sys.argv[1:])]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as reader:
        theirs.close()
        send(plan, ours)
    sys.exit(reader.returncode)


if __name__ == "__main__":
    main()
