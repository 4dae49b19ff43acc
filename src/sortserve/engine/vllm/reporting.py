"""Counters of the vLLM scheduler, sent to whoever listens: our front end, in another process.

One ZeroMQ PUSH socket that never waits: if nobody listens, a report is dropped. Reports are complete, so that costs nothing.
"""

import contextlib
from collections import Counter
from typing import Any

import msgspec
import zmq

from sortserve.engine.ladder import Ladder
from sortserve.engine.policies.protocol import Reason
from sortserve.engine.vllm.deciding import Decider

REPORT_SECONDS = 0.25


class Reporter:
    """Counts from the engine's start and reports a few times a second; to nobody if `address` is ""."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] | None = None
        if address:
            self._socket = zmq.Context.instance().socket(zmq.PUSH)
            self._socket.setsockopt(zmq.SNDHWM, 16)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(address)
        self._next = 0.0
        self._steps = 0
        self._recomputed = 0
        self._generated: Counter[str] = Counter()
        self._selected: Counter[str] = Counter()
        self._switches: Counter[str] = Counter({"up": 0, "down": 0})
        self._dropped: Counter[str] = Counter()

    def switched(self, ladder: Ladder, before: int, after: int) -> None:
        """A request went on at another place; up is towards the full model."""
        self._switches["up" if after > before else "down"] += 1

    def selected(self, submodel_id: str, reason: int) -> None:
        """A request starts to run a sub-model."""
        self._selected[f"{submodel_id} {Reason(reason).name.lower()}"] += 1

    def generated(self, submodel_id: str, tokens: int) -> None:
        """Output tokens came."""
        self._generated[submodel_id] += tokens

    def recomputed(self, tokens: int) -> None:
        """So many tokens of context are computed again for a deeper sub-model."""
        self._recomputed += tokens

    def dropped(self, reason: str) -> None:
        """A request was refused or cut."""
        self._dropped[reason] += 1

    def report(self, scheduler: Any, decider: Decider, now: float, *, goes_on: bool) -> None:
        """A step has ended; send the figures if it is time, or if nobody is left (not `goes_on`): no step comes then."""
        self._steps += 1
        if self._socket is None or (goes_on and now < self._next):
            return
        self._next = now + REPORT_SECONDS
        running, waiting = scheduler.get_request_counts()
        message = {
            "running": running,
            "waiting": waiting,
            "kv_usage": float(scheduler.kv_cache_manager.usage),
            "steps": self._steps,
            "recomputed_tokens": self._recomputed,
            "generated_tokens": dict(self._generated),
            "selected": dict(self._selected),
            "switches": dict(self._switches),
            "dropped": dict(self._dropped),
            "decider": dict(decider.stats()),
        }
        with contextlib.suppress(zmq.Again):  # nobody listens; the next report says all of this and more
            self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """No more reports."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
