"""What the scheduler inside vLLM asks before every step, and who answers. No vLLM, no torch.

The mix-in (`sched.py`) shows all requests alive as records and carries the answer out: a shallower sub-model at once, another
width or a deeper one by preemption and recomputation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sortserve.engine.budget import Budget
from sortserve.engine.cost import StepShape
from sortserve.engine.policies.protocol import NEVER_RAN, Reason


@dataclass(frozen=True, slots=True)
class Record:
    """One request alive. Times in seconds on the monotonic clock; places in the ladder."""

    request_id: str
    arrival: float
    num_prompt: int
    num_output: int
    num_computed: int  # tokens that have K/V up to `place`'s exit
    max_tokens: int
    ignore_eos: bool
    floor: int
    ceiling: int
    place: int = NEVER_RAN
    running: bool = False
    first_token: float | None = None
    last_switch: int = 0  # number of output tokens at the last change of sub-model
    budget: Budget | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What one request runs from now on. `refuse`: only a strict one that never ran; `cut`: end it with what it has."""

    place: int
    reason: Reason = Reason.BEST
    refuse: bool = False
    cut: bool = False


class Decider(Protocol):
    """Chooses for all requests at once."""

    def decide(self, requests: Sequence[Record], now: float) -> Mapping[str, Choice]:
        """A choice by request id, within floor and ceiling; who is left out goes on as it is."""
        ...

    def note(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape ran and took so long."""
        ...


class CeilingDecider:
    """Everybody runs the best that they may: pins and floors alone, no policy."""

    def decide(self, requests: Sequence[Record], now: float) -> Mapping[str, Choice]:
        """See Decider."""
        return {each.request_id: Choice(each.ceiling, Reason.FIXED) for each in requests}

    def note(self, shape: StepShape, seconds: float) -> None:
        """Nothing is learned."""
