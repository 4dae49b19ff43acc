"""When the policy is asked, and what stands between two answers: the last one.

An arrival is answered before the next step is planned. Everything else (ends, prompts that go on, memory that was short,
deadlines that come nearer) is looked at while the step after it runs, so that the policy's own time is nobody's.
"""

import time
from collections.abc import Callable

import numpy as np

from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Policy, View, wants_confidence
from sortserve.engine.rungs import Ints
from sortserve.engine.table import RequestTable

ASK_EVERY = 8
"""Steps after which the policy is asked even if nothing happened: deadlines come nearer all the time."""
ASK_SECONDS = 0.25
"""Or so many seconds, where steps are long."""
MOST_SHARE = 0.1
"""Of the time of steps that answers of the policy may take, arrivals or not. It was asked before nearly every step of 6 ms
(bundled model, 64 arrivals a second) and took 1 to 3 ms each time. Who arrives waits for a few such steps instead."""


class Decider:
    """Keeps the policy's last answer, and knows when it is out of date."""

    def __init__(self, policy: Policy, table: RequestTable, ask_every: int = ASK_EVERY) -> None:
        """`ask_every` 1: before every step, for policies that are told things from outside."""
        self.policy = policy
        self.ask_every = ask_every
        self.chunk_tokens = 0
        self.steps = 1  # run since the policy was asked
        self._least_steps = 0  # to run before it is asked again
        self._table = table
        self._urgent = True
        self._stale = False
        self._until = -np.inf

    def note(self, *, urgent: bool = False) -> None:
        """Something happened. `urgent`: the next step must not be planned without asking."""
        self._stale = True
        self._urgent = self._urgent or urgent

    @property
    def wants_confidence(self) -> bool:
        """Whether the policy looks at how sure each token was."""
        return wants_confidence(self.policy)

    @property
    def must_ask(self) -> bool:
        """Whether the next step waits for the policy."""
        return (self._urgent and self.steps >= self._least_steps) or self._asks_each_step

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for an answer."""
        return self._urgent or self._asks_each_step

    def may_ask(self, now: float) -> bool:
        """Whether the last answer is out of date, so that it is worth asking beside a running step."""
        if self._asks_each_step or self.steps < self._least_steps:
            return False
        return self._stale or self.steps >= self.ask_every or now >= self._until

    @property
    def _asks_each_step(self) -> bool:
        # signals of the last token are for the next one
        return self.ask_every == 1 or self.wants_confidence

    def step_ran(self) -> None:
        """One more step by the last answer."""
        self.steps += 1

    def ask(self, look: Callable[[], View]) -> tuple[bool, Ints]:
        """Ask the policy, and keep its answer; returns whether anything is different now, and the rows it refuses."""
        began = time.perf_counter()
        view = look()
        decision = self.policy.decide(view)
        took = time.perf_counter() - began
        step_seconds = view.cost.last_seconds
        self._least_steps = min(int(took / (MOST_SHARE * step_seconds)), self.ask_every) if step_seconds > 0 else 0
        place = np.where(decision.refuse, SITS_OUT, decision.place)
        inside = (place >= view.floor) & (place <= view.ceiling)
        assert (inside | (place == SITS_OUT)).all(), "a policy broke a floor or a ceiling"
        assert (~decision.refuse | (view.strict & (view.place == NEVER_RAN))).all(), "a policy refused what may not be"
        table, count = self._table, len(view)
        changed = bool((table.decided[:count] != place).any()) or decision.chunk_tokens != self.chunk_tokens
        table.decided[:count] = place
        table.reasons[:count] = decision.reason
        self.chunk_tokens = decision.chunk_tokens
        self.steps = 0
        self._urgent = self._stale = False
        self._until = view.now + ASK_SECONDS
        return changed, np.flatnonzero(decision.refuse)
