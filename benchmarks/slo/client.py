"""The client process: `python -m benchmarks.slo.client PLAN OUTCOMES`, both MessagePack files of `wire.py`.

Open loop: requests leave when they are due, however many are unanswered, and how late each left is kept: a client that
waits for its server hides the queue it stands in. Closed loop: so many clients, each as fast as it is answered.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.slo.http_client import Answer, Pool
from benchmarks.slo.priority import give_way
from benchmarks.slo.wire import Ask, Outcome, Plan

_LEAD_SECONDS = 0.25  # between the plan being read and the first request being due


class Run:
    """One run of a plan: its clock, its connections, and what came back."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.outcomes: list[Outcome] = []
        self._began = time.monotonic() + _LEAD_SECONDS
        self._pool = Pool(plan.port, self.now)
        self._open: dict[int, tuple[Ask, float]] = {}  # place of the request -> it, and when it was sent
        self._sent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        """Seconds from the start."""
        return time.monotonic() - self._began

    async def open_loop(self) -> None:
        """Every request when it is due; then wait for answers, `plan.seconds` at most."""
        await self._pool.open(self.plan.clients)
        self._began = time.monotonic() + _LEAD_SECONDS
        loop = asyncio.get_running_loop()
        for ask in self.plan.asks:
            loop.call_at(self._began + ask.due, self._send, ask)
        last = max((ask.due for ask in self.plan.asks), default=0.0)
        while self.now() < last + self.plan.seconds and len(self.outcomes) < len(self.plan.asks):
            await asyncio.sleep(0.05)
        await self._give_up()

    async def closed_loop(self) -> None:
        """Clients that ask one after another, round and round the plan's requests, until the time is over."""
        await self._pool.open(self.plan.clients)
        self._began = time.monotonic()
        for _ in range(self.plan.clients):
            self._send_next()
        await asyncio.sleep(self.plan.seconds)
        await self._give_up()

    def _send_next(self) -> None:
        if self.now() < self.plan.seconds:
            self._send(self.plan.asks[self._sent % len(self.plan.asks)], then=self._send_next)

    def _send(self, ask: Ask, then: Callable[[], None] | None = None) -> None:
        place, self._sent = self._sent, self._sent + 1

        def done(answer: Answer) -> None:
            self._keep(place, answer)
            if then is not None:
                then()

        connection = self._pool.take()
        if connection is not None:
            connection.ask(ask.payload, done)
            self._open[place] = (ask, self.now())
            return

        async def connect_and_send() -> None:
            try:
                made = await self._pool.take_or_connect()
            except (OSError, asyncio.CancelledError):  # cancelled: the run is over
                self._open[place] = (ask, self.now())
                done(Answer())
                return
            made.ask(ask.payload, done)
            self._open[place] = (ask, self.now())

        task = asyncio.get_running_loop().create_task(connect_and_send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _keep(self, place: int, answer: Answer) -> None:
        ask, sent = self._open.pop(place)
        status = 0 if answer.broken else answer.status
        first = -1.0 if answer.first is None else answer.first
        last = -1.0 if answer.last is None or answer.broken else answer.last
        self.outcomes.append(Outcome(ask.number, ask.due, sent, first, last, status, answer.headers, answer.tail))

    async def _give_up(self) -> None:
        """Close everything: what is unanswered comes back as broken."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.close()
        while self._open:
            await asyncio.sleep(0.01)


async def run(plan: Plan) -> list[Outcome]:
    """Do what the plan says."""
    running = Run(plan)
    await (running.open_loop() if plan.loop == "open" else running.closed_loop())
    return running.outcomes


def main() -> None:
    """Read the plan, run it, write the outcomes."""
    plan_file, outcomes_file = map(Path, sys.argv[1:])
    plan = msgspec.msgpack.decode(plan_file.read_bytes(), type=Plan)
    give_way(plan.nice)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection of all that was read takes longer than a request may be late
    outcomes_file.write_bytes(msgspec.msgpack.encode(asyncio.run(run(plan))))


if __name__ == "__main__":
    main()
