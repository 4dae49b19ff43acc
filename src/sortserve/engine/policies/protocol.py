"""Which sub-model each request runs next: what a policy sees, and what it answers. Arrays only, no torch.

A policy is a pure function of the view plus whatever small state it keeps (hysteresis, smoothed load). The native engine,
vLLM and the simulator show it the same view; it reads what the back end can do and never asks which one it is. It decides
sub-models, who sits out, who is refused, and how many rows of prompts a step takes. The order of requests and the filling
of a step are not its business: all policies share `step.py` and `admission.py`.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Protocol

import numpy as np

from sortserve.engine.cost import StepCost
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs

NEVER_RAN = -1
"""`place` of a request that has not run yet."""
SITS_OUT = -1
"""Chosen in place of a rung: no rows in this step."""


class Reason(IntEnum):
    """Why a request runs what it runs; counted at every change, by the lower-case name."""

    BEST = 0  # nothing stands against its ceiling
    PINNED = 1
    FIXED = 2
    DEADLINE = 3  # its own deadline
    OTHERS = 4  # others' deadlines
    MEMORY = 5
    HOLD = 6  # a change would not pay back, or came too soon after the last one
    CONFIDENCE = 7
    ADMISSION = 8  # chosen when it was admitted and not changed since


@dataclass(frozen=True)
class View:
    """All requests alive, in any order, at one moment. n requests; seconds on the engine's clock; inf where no deadline.

    `computed[i, s]` tokens have K/V in segment s; it never rises with s. `cached[i, p]` tokens would be found in the prefix
    cache if request i, which has not run yet, started at place p. `resumable[i]`: rows that lack only deeper segments start
    there, from kept exit states; else they run from layer 0.
    """

    now: float
    rungs: Rungs
    cost: StepCost
    step_tokens: int  # most rows at full depth that a step takes
    max_running: int
    capabilities: frozenset[str]  # of refill, sit_out, reuse
    arrival: Floats  # [n]
    running: Bools  # [n] holds pages
    place: Ints  # [n] NEVER_RAN before its first step
    floor: Ints  # [n] lowest place allowed
    ceiling: Ints  # [n] highest place allowed
    num_prompt: Ints  # [n]
    num_output: Ints  # [n]
    expected_left: Ints  # [n] output tokens it is expected to still produce, at least 1
    computed: Ints  # [n, segments]
    cached: Ints  # [n, places]
    resumable: Bools  # [n]
    exact: Bools  # [n] `kv: exact`: a change of widths or skips computes everything again
    strict: Bools  # [n] may be refused as long as it has not run
    budgeted: Bools  # [n] has a latency budget
    first_due: Floats  # [n] when the first token is due
    last_due: Floats  # [n] when the last expected token is due, by total and TPOT both, as far as known now
    next_due: Floats  # [n] the nearest deadline: of the next token, or of the last one if that is nearer
    tokens_since_switch: Ints  # [n] output tokens since its sub-model changed last
    confidence: Floats  # [n] maximum probability of its last token at its exit; NaN before there is one
    within: Floats | None = None  # [n, exits] probability that the next token needs no deeper exit, by a trained head;
    # NaN where unknown; None: there is no head, or nobody has a token yet
    starts: float = 0.0  # requests that begin a second, of late
    start_rows: float = 0.0  # prompt rows of one of them, on average

    @cached_property
    def known(self) -> Ints:
        """[n] tokens known: prompt and output."""
        return self.num_prompt + self.num_output

    @cached_property
    def order(self) -> Ints:
        """[n] indices, the nearest deadline first, then by arrival."""
        return np.lexsort((self.arrival, self.next_due))

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True, slots=True)
class Decision:
    """One answer per request of the view, in its order. `place` lies within floor and ceiling, or is SITS_OUT."""

    place: Ints  # [n]
    reason: Ints  # [n] of Reason
    refuse: Bools  # [n] only strict ones that never ran
    chunk_tokens: int  # most rows, at full depth, of prompts and refills in this step


class Policy(Protocol):
    """Chooses; holds no reference to requests between calls."""

    name: str

    def decide(self, view: View) -> Decision:
        """See Decision."""
        ...


def wants_confidence(policy: Policy) -> bool:
    """Whether it looks at how sure each token was, and so is asked at each step; a policy says so by an attribute of that
    name."""
    return bool(getattr(policy, "wants_confidence", False))
