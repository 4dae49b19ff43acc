"""When the policy is asked, and what stands between two answers: the last one."""

import numpy as np

from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Policy, View
from sortserve.engine.table import RequestTable

ASK_EVERY = 8
"""Steps after which the policy is asked even if nothing happened: deadlines come nearer all the time."""
ASK_SECONDS = 0.25
"""Or so many seconds, where steps are long."""


class Decider:
    """Asks the policy at events (`note`) and every few steps, and repeats its last answer in between."""

    def __init__(self, policy: Policy, table: RequestTable, ask_every: int = ASK_EVERY) -> None:
        self.policy = policy
        self.chunk_tokens = 0
        self.steps = 1  # run since the policy was asked
        self._table = table
        self.ask_every = ask_every
        self._steps_left = 0
        self._until = -np.inf

    def note(self) -> None:
        """Something happened: an arrival, an end, a preemption, a prompt that goes on."""
        self._steps_left = 0

    def due(self, now: float) -> bool:
        """Whether the next decision has to come from the policy."""
        return self._steps_left <= 0 or now >= self._until

    def step_repeated(self) -> None:
        """A step ran by the last answer."""
        self._steps_left -= 1
        self.steps += 1

    def decide(self, view: View) -> Decision:
        """The policy's answer, or the last one again. Refusals are told once."""
        count = len(view)
        if not self.due(view.now):
            self.step_repeated()
            table = self._table
            place, reasons = table.decided[:count].copy(), table.reasons[:count].copy()
            return Decision(place, reasons, np.zeros(count, np.bool_), self.chunk_tokens)
        decision = self.policy.decide(view)
        place = decision.place
        inside = (place >= view.floor) & (place <= view.ceiling)
        assert (inside | (place == SITS_OUT)).all(), "a policy broke a floor or a ceiling"
        assert (~decision.refuse | (view.strict & (view.place == NEVER_RAN))).all(), "a policy refused what may not be"
        self._table.decided[:count] = place
        self._table.reasons[:count] = decision.reason
        self.chunk_tokens = decision.chunk_tokens
        self._steps_left = self.ask_every - 1
        self.steps = 1
        self._until = view.now + ASK_SECONDS
        return decision
