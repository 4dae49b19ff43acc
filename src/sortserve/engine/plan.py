"""What crosses from the scheduler to the runner, and back: plain frozen data, made anew each step.

msgspec's structs, because some are made for every row of every step: one of `SequencePlan`'s size takes 0.3 us, where a
frozen dataclass takes 3.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from sortserve.engine.protocol import TokenLogprob
from sortserve.engine.sampling import SamplingParams

Ints = NDArray[np.int32]

PENDING = -1
"""Stands for a token that a running step is to give: known to be there, but not which."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """Rows of one sequence at positions [start, stop) that run segments [first_segment, exit) with the same settings.

    With first_segment 0 they start from their tokens' embeddings, else from the states kept at exit `first_segment`.
    """

    start: int
    stop: int
    first_segment: int
    exit: int
    settings: tuple[int, ...]  # [exit], id of the layer settings (widths, skips) in each segment

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


class SampleSpec(msgspec.Struct, frozen=True, gc=False):
    """How to draw the token that follows the last row. `output` are the tokens drawn so far."""

    params: SamplingParams
    seed: int
    position: int  # of the token to draw
    prompt: tuple[int, ...]
    output: tuple[int, ...]


class SequencePlan(msgspec.Struct, frozen=True, gc=False):
    """One sequence's part of a step: its rows, and where their K/V and states live.

    `spans` ascend in position without gap or overlap. `pages` are page numbers, [blocks, columns],
    the columns of each segment as `KVGeometry.columns` says, valid for segments below `exit`. Rows at positions below
    `watermark[s]` find their K/V of segment s already there and write none. `state_pages[(block, exit)]`
    is where states are read from and, if `keep_states`, written to.
    """

    request_id: str
    submodel: int  # place in the ladder
    exit: int
    spans: tuple[Span, ...]
    # ids of the sequence's tokens from position 0: its own list, which only grows, not a copy. The last may be PENDING: the
    # one that the step launched before this one draws for this sequence
    tokens: Sequence[int]
    watermark: tuple[int, ...]  # [exit] before the step
    pages: Ints  # [blocks, columns]
    state_pages: dict[tuple[int, int], tuple[int, ...]]
    keep_states: bool
    sample: SampleSpec | None  # None: no logits, the sequence has not caught up yet
    prompt_logprobs: int | None = None  # alternatives to report for each of `successors`; None: none
    successors: tuple[int, ...] = ()  # prompt tokens that follow the rows, as far as they are in the prompt

    @property
    def start(self) -> int:
        """First position that runs."""
        return self.spans[0].start

    @property
    def stop(self) -> int:
        """One past the last position that runs."""
        return self.spans[-1].stop

    @property
    def num_refilled(self) -> int:
        """Tokens computed before that run again, to be deepened or with other widths."""
        if self.start >= self.watermark[0]:
            return 0
        return sum(span.num_rows for span in self.spans if span.start < self.watermark[0])

    @property
    def widest(self) -> int:
        """Settings id of the newest rows' first segment, to keep rows of like width together."""
        return self.spans[-1].settings[0]


class Plan(msgspec.Struct, frozen=True, gc=False):
    """One step. `sequences` are in row order: exit descending, so that in every segment without entrants the active
    rows are the first ones."""

    step: int
    sequences: tuple[SequencePlan, ...]
    confidence: bool = False  # whether it is wanted how sure each token drawn is, and how deep the next one must run

    @property
    def num_rows(self) -> int:
        """Rows that run in at least one segment."""
        return sum(span.num_rows for sequence in self.sequences for span in sequence.spans)


class SequenceResult(msgspec.Struct, frozen=True, gc=False):
    """What a step gave for one sequence of the plan. `token` is None where nothing was sampled."""

    token: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the plan's `successors`
    error: str | None = None  # why the request's grammar lets no token follow; then there is none
    confidence: float | None = None  # probability of the most probable token; None: the plan did not ask
    within: tuple[float, ...] | None = None  # by exit: probability that the next token needs none deeper; None: no head


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """Results in the order of the plan's sequences, and the step's time."""

    sequences: tuple[SequenceResult, ...]
    seconds: float


class LaunchedStep(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Its result; waits for it."""
        ...


class StepRunner(Protocol):
    """What runs steps: a model, or a clock that stands in for one."""

    def run(self, plan: Plan) -> StepResult:
        """One step."""
        ...


@runtime_checkable
class LaunchingRunner(StepRunner, Protocol):
    """A runner that works on its own once a step is launched. A second one may be launched before the first one's result is
    taken: steps run in the order of their launches, all that one writes is there for the next, PENDING tokens included."""

    def launch(self, plan: Plan) -> LaunchedStep:
        """Start a step. Nothing of `plan` is read after the return."""
        ...
