"""Who decides what runs, as the vLLM scheduler asks it: once per step, about all requests alive. No torch, no vLLM.

The scheduler clamps whatever comes back to each request's floor and ceiling and never raises on it; a decider that raises
ends the engine process, as any bug in the scheduler does. All times are seconds on `time.monotonic()`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sortserve.engine.budget import Budget
from sortserve.engine.ladder import Ladder
from sortserve.engine.policies.protocol import Reason
from sortserve.engine.settings import SettingsTable

CAPABILITIES = frozenset({"reuse"})
"""What vLLM can do of refill, sit_out and reuse: a request that goes deeper is preempted and its context computed again,
and all that run take part in a step."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a decider is made from; fixed after start."""

    ladder: Ladder
    settings: SettingsTable
    options: Mapping[str, Any]  # of the configuration, for this decider
    max_running: int  # requests
    step_tokens: int  # most rows of a step
    max_model_len: int  # tokens
    block_tokens: int  # tokens of one block of K/V
    kv_blocks: int  # blocks of all layers


@dataclass(frozen=True, slots=True)
class Standing:
    """One request, before a step."""

    request_id: str
    place: int  # NEVER_RAN before its first step
    floor: int  # place
    ceiling: int  # place
    pinned: bool
    running: bool  # holds blocks
    arrival: float
    budget: Budget | None
    exact: bool  # `kv: exact`: a change of widths or skips computes the context again
    num_prompt: int
    num_output: int
    num_computed: int  # tokens with K/V for every place of `used`
    max_tokens: int  # output
    first_token: float | None
    last_token: float | None
    tokens_since_switch: int
    used: frozenset[int] = frozenset()  # places that computed the K/V it has
    ignore_eos: bool = False  # it makes all of `max_tokens`
    num_cached: int = 0  # tokens of its prompt that were found in the prefix cache


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to happen to requests, by id; one that is not named stays as it is, or starts at its ceiling."""

    place: Mapping[str, int] = field(default_factory=dict)
    reason: Mapping[str, int] = field(default_factory=dict)  # of policies.protocol.Reason
    refuse: frozenset[str] = frozenset()  # only those that never ran
    cut: frozenset[str] = frozenset()  # end now, with what they have
    chunk_tokens: int | None = None  # most rows of prompts in this step; None: what vLLM allows
    foretold: Mapping[str, tuple[float, bool]] = field(default_factory=dict)
    """Of those that have a budget and may begin now: seconds from arrival to the last token, and whether that keeps it."""
    order: tuple[str, ...] = ()  # whose turn comes first where not all can run; others come behind, as vLLM has them


class Rows(NamedTuple):
    """What ran on one place in a step."""

    rows: int = 0
    requests: int = 0
    context: int = 0  # tokens, these rows included, of all these requests
    pairs: float = 0.0  # query x context pairs of those with more than one row


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What ran in a step and how long it took until its outputs: from its scheduling, or from the end of the step before it
    if that was later."""

    rows: Mapping[int, Rows]  # by place
    seconds: float
    had_prompt: bool
    between: float | None = None  # seconds from the end of the step before it; None if nobody was left then


class Decider(Protocol):
    """Chooses the sub-model of every request."""

    def decide(self, requests: Sequence[Standing], now: float) -> Answer:
        """Called once per step, also when nothing is alive any more."""
        ...

    def measured(self, step: MeasuredStep) -> None:
        """A step has run."""
        ...

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        """A request came to its own end: it was neither cut nor aborted nor refused."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """What the front end is told, a few times a second; values that MessagePack can carry."""
        ...


DeciderFactory = Callable[[Setup], Decider]


class CeilingDecider:
    """The default: every request runs its ceiling, which is the sub-model it is pinned to or the full model."""

    def decide(self, requests: Sequence[Standing], now: float) -> Answer:
        """See Decider."""
        return Answer(
            {request.request_id: request.ceiling for request in requests},
            {request.request_id: Reason.PINNED if request.pinned else Reason.BEST for request in requests},
        )

    def measured(self, step: MeasuredStep) -> None:
        """Nothing is learnt."""

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        """Nothing is learnt."""

    def stats(self) -> Mapping[str, Any]:
        """Nothing is told."""
        return {}


def ceiling_decider(setup: Setup) -> Decider:
    """A CeilingDecider; the factory that is used if none is configured."""
    return CeilingDecider()
