"""A small ladder and a runner without torch, for the tests of the bookkeeping and the scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Entry, Ladder, Quality
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import PENDING, Plan, SequencePlan, SequenceResult, StepResult
from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Reason, View
from sortserve.engine.protocol import TokenLogprob
from sortserve.engine.request import Request
from sortserve.engine.rungs import Rungs
from sortserve.engine.sequence_kv import SequenceKV
from sortserve.engine.settings import SettingsTable
from sortserve.engine.submodel import ModelShape, SubModel

SHAPE = ModelShape(
    num_layers=6, hidden_size=16, ffn_width=64, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=100, dtype_bytes=4
)
EXITS = (1, 3, 4, 6)
BLOCK = 4
NUM_SEGMENTS = len(EXITS)


def small_ladder(widths: Sequence[int] = (32, 64), *, degraded: Sequence[str] = ()) -> Ladder:
    """Every exit at every width, quality by share of the layers."""
    entries = []
    for depth in EXITS:
        for width in widths:
            submodel = SubModel.make(depth, width)
            name = submodel.name(SHAPE)
            assert name is not None
            quality = Quality(depth / 6 * (0.9 if width < 64 else 1.0))
            entries.append(Entry(name, submodel, quality, name in degraded))
    return Ladder.of(SHAPE, entries)


LADDER = small_ladder()
GEOMETRY = KVGeometry.of(SHAPE, LADDER.bounds, BLOCK)


def step_seconds(place: int, rows: float, ladder: Ladder = LADDER) -> float:
    """A synthetic machine: 1 ms a step, 1 ms for each layer, 2 ms for each full FFN; 32 rows cost twice one."""
    submodel = ladder.entries[place].submodel
    rows_share = 1 + (rows - 1) / 31
    return 1e-3 * (1 + (submodel.depth + 2 * sum(submodel.widths) / SHAPE.ffn_width) * rows_share)


def step_cost(ladder: Ladder = LADDER) -> CostTable:
    """The table of that machine."""
    rungs = Rungs.of(ladder, SettingsTable(ladder))
    buckets = np.array([1.0, 16.0, 64.0, 256.0])
    layer = 1e-3 * (1 + (buckets - 1) / 31)
    return CostTable(rungs.layers, buckets, layer, 2 * layer, np.zeros(4), base=1e-3)


def compute(
    kv: KVManager,
    sequence: SequenceKV,
    tokens: Sequence[int],
    exit: int,
    target: tuple[int, ...] | None = None,
    *,
    states: bool = False,
) -> int:
    """Bring all of `tokens` to `exit` like a step without a limit does; returns what was found in the prefix cache."""
    wanted = (0,) * exit if target is None else target
    found = kv.adopt(sequence, tokens, exit, wanted)
    spans, _ = sequence.spans(exit, len(tokens), wanted, 10**6)
    if spans:
        assert kv.reserve(sequence, exit, len(tokens), states=states), "the test's pool is too small"
        kv.advance(sequence, tokens, exit, spans, states=states)
    return found


def canned_token(position: int) -> int:
    """The token that the fake runner draws at a position."""
    return (position * 37 + 11) % SHAPE.vocab_size


class WantedPolicy:
    """Every request runs what the test says, inside its floor and ceiling; None sits out. It looks at the requests
    themselves, which real policies never see: `requests` is the scheduler's, whose order the view has."""

    name = "wanted"

    def __init__(self, default: int | None = LADDER.full) -> None:
        self.wanted: dict[str, int | None] = {}
        self.default = default
        self.requests: Mapping[str, Request] = {}

    def decide(self, view: View) -> Decision:
        wanted = [self.wanted.get(name, self.default) for name, request in self.requests.items() if not request.left]
        place = np.array([SITS_OUT if place is None else place for place in wanted], np.int64)
        place = np.where(place == SITS_OUT, SITS_OUT, np.clip(place, view.floor, view.ceiling))
        reason = np.full(len(view), int(Reason.FIXED))
        return Decision(place, reason, np.zeros(len(view), np.bool_), view.step_tokens)


class RefusesStrict(FixedPolicy):
    """Gives up every strict request before it runs."""

    def decide(self, view: View) -> Decision:
        return replace(super().decide(view), refuse=view.strict & (view.place == NEVER_RAN))


class FakeRunner:
    """Returns canned tokens, and keeps for every place of every page what a real runner would have written there.

    A row that would read K/V or a state of other tokens or other settings than its own fails.
    """

    def __init__(self, geometry: KVGeometry = GEOMETRY) -> None:
        self._geometry = geometry
        self._memory: dict[tuple[int, int], object] = {}  # (page, slot)
        self._drew: set[str] = set()  # for whom the last step drew a token

    def run(self, plan: Plan, requests: dict[str, Request]) -> StepResult:
        """Check and carry out a plan."""
        assert len({part.request_id for part in plan.sequences}) == len(plan.sequences)
        assert [part.exit for part in plan.sequences] == sorted((part.exit for part in plan.sequences), reverse=True)
        for part in plan.sequences:
            self._write(part, requests[part.request_id])
        for part in plan.sequences:
            self._read(part, requests[part.request_id])
        self._drew = {part.request_id for part in plan.sequences if part.sample is not None}
        return StepResult(tuple(_result(part) for part in plan.sequences), 0.0)

    def _content(self, part: SequencePlan, request: Request, segment: int, position: int) -> object:
        settings = request.kv.settings[: segment + 1, : position + 1].copy()
        for span in part.spans:
            stop = min(span.stop, position + 1)
            if span.start < stop:
                settings[:, span.start : stop] = np.asarray(span.settings[: segment + 1])[:, None]
        known = request.tokens[: position + 1]
        if known[-1] == PENDING:
            assert part.request_id in self._drew, "nothing to take the token from"
            known[-1] = canned_token(position)
        assert PENDING not in known, "only the last token can be on its way"
        return tuple(known), settings.tobytes()

    def _write(self, part: SequencePlan, request: Request) -> None:
        size = self._geometry.block_tokens
        assert part.start == part.watermark[part.exit - 1], "rows must start at the watermark"
        assert list(part.tokens[part.start : part.stop]) == request.tokens[part.start : part.stop]
        stop = part.start
        for span in part.spans:
            assert span.start == stop, "spans must follow each other"
            assert span.exit == part.exit
            stop = span.stop
            for position in range(span.start, span.stop):
                block, slot = divmod(position, size)
                if span.first_segment > 0:
                    state = self._memory.get((part.state_pages[block, span.first_segment][0], slot))
                    assert state == ("state", self._content(part, request, span.first_segment - 1, position))
                for segment in range(span.first_segment, part.exit):
                    if position >= part.watermark[segment]:
                        content = self._content(part, request, segment, position)
                        for page in part.pages[block, self._geometry.columns(segment)]:
                            self._memory[int(page), slot] = content
                if part.keep_states and part.exit < self._geometry.num_segments:
                    content = self._content(part, request, part.exit - 1, position)
                    for page in part.state_pages[block, part.exit]:
                        self._memory[page, slot] = ("state", content)

    def _read(self, part: SequencePlan, request: Request) -> None:
        for segment in range(part.exit):
            for position in range(part.stop):
                block, slot = divmod(position, self._geometry.block_tokens)
                expected = self._content(part, request, segment, position)
                for page in part.pages[block, self._geometry.columns(segment)]:
                    assert self._memory.get((int(page), slot)) == expected, (part.request_id, segment, position)


def _result(part: SequencePlan) -> SequenceResult:
    token = None if part.sample is None else canned_token(part.sample.position)
    logprobs = tuple(TokenLogprob(token, -float(part.start + 1 + i)) for i, token in enumerate(part.successors))
    return SequenceResult(token, None, logprobs)
