"""One sequence's bookkeeping: which rows have to run, against an oracle that goes token by token."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sortserve.engine.pages import Cell
from sortserve.engine.plan import Span
from sortserve.engine.sequence_kv import SequenceKV
from tests.engine.small import BLOCK, GEOMETRY, NUM_SEGMENTS

CAPACITY = 24
BOUNDS = GEOMETRY.bounds


@dataclass
class Case:
    kv: SequenceKV
    exit: int
    stop: int
    target: tuple[int, ...]
    max_cost: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv = SequenceKV(GEOMETRY, CAPACITY)
    levels = st.lists(st.integers(0, CAPACITY - 1), min_size=NUM_SEGMENTS, max_size=NUM_SEGMENTS)
    kv.watermark = sorted(draw(levels), reverse=True)
    if draw(st.booleans()):  # the common case of decoding
        kv.watermark = [kv.watermark[0]] * NUM_SEGMENTS
    kv.resume[:] = draw(st.lists(st.integers(0, NUM_SEGMENTS - 1), min_size=CAPACITY, max_size=CAPACITY))
    for segment in range(NUM_SEGMENTS):
        runs = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 2)), max_size=5))
        row = [setting for length, setting in runs for _ in range(length)][:CAPACITY]
        kv.settings[segment, : len(row)] = row
    exit = draw(st.integers(1, NUM_SEGMENTS))
    start = kv.watermark[exit - 1]
    stop = draw(st.just(start + 1) | st.integers(start, CAPACITY))
    target = tuple(draw(st.lists(st.integers(0, 2), min_size=exit, max_size=exit)))
    return Case(kv, exit, stop, target, draw(st.integers(0, 150)))


def rows_of(spans: list[Span]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [
        (position, span.first_segment, span.settings) for span in spans for position in range(span.start, span.stop)
    ]


def oracle(case: Case) -> tuple[list[tuple[int, int, tuple[int, ...]]], int]:
    """(position, first segment, settings) of each row, and the cost in rows x layers."""
    kv, rows, cost = case.kv, [], 0
    for position in range(kv.watermark[case.exit - 1], case.stop):
        there = 0  # segments below the exit whose K/V the token has; the state at an exit is of use only if it has all below
        while there < case.exit and kv.watermark[there] > position:
            there += 1
        kept = int(kv.resume[position])
        first = kept if kept <= there else 0
        layers = sum(BOUNDS[segment + 1] - BOUNDS[segment] for segment in range(first, case.exit))
        if cost + layers > case.max_cost:
            break
        cost += layers
        recorded = [int(kv.settings[segment, position]) for segment in range(case.exit)]
        settings = tuple(case.target[s] if setting == -1 else setting for s, setting in enumerate(recorded))
        rows.append((position, first, settings))
    return rows, cost


@given(cases())
def test_spans_against_the_oracle(case: Case) -> None:
    spans, cost = case.kv.spans(case.exit, case.stop, case.target, case.max_cost)
    assert (rows_of(spans), cost) == oracle(case)
    assert all(span.exit == case.exit for span in spans)
    assert all(span.num_rows > 0 for span in spans)
    for a, b in pairwise(spans):
        assert a.stop == b.start
        assert (a.first_segment, a.settings) != (b.first_segment, b.settings), "neighbours alike are one span"


@given(cases(), st.booleans())
def test_record(case: Case, states_kept: bool) -> None:
    kv = case.kv
    spans, _ = kv.spans(case.exit, case.stop, case.target, case.max_cost)
    assume(spans)
    before, settings, resume = list(kv.watermark), kv.settings.copy(), kv.resume.copy()
    start, stop = spans[0].start, spans[-1].stop
    kv.record(case.exit, spans, states_kept=states_kept)
    for segment in range(NUM_SEGMENTS):
        raised = segment < case.exit
        assert kv.watermark[segment] == (max(before[segment], stop) if raised else before[segment])
    assert kv.watermark == sorted(kv.watermark, reverse=True)
    for position in range(CAPACITY):
        inside = start <= position < stop
        for segment in range(NUM_SEGMENTS):
            was = settings[segment, position]
            if inside and segment < case.exit:
                assert kv.settings[segment, position] == (case.target[segment] if was == -1 else was)
            else:
                assert kv.settings[segment, position] == was
        if not inside or (case.exit < NUM_SEGMENTS and not states_kept):
            assert kv.resume[position] == resume[position]
        else:
            assert kv.resume[position] == (0 if case.exit == NUM_SEGMENTS else case.exit)
    assert kv.spans(case.exit, stop, case.target, 10**6) == ([], 0), "nothing is left of them"


@given(cases())
def test_chunks_of_any_size_add_up(case: Case) -> None:
    """Running by chunks runs the same rows as running all at once."""
    whole, total = case.kv.spans(case.exit, case.stop, case.target, 10**6)
    chunk = max(case.max_cost, BOUNDS[-1])
    rows: list[tuple[int, int, tuple[int, ...]]] = []
    cost = 0
    while True:
        spans, part = case.kv.spans(case.exit, case.stop, case.target, chunk)
        if not spans:
            break
        assert part <= chunk
        rows, cost = rows + rows_of(spans), cost + part
        case.kv.record(case.exit, spans, states_kept=False)
    assert (rows, cost) == (rows_of(whole), total)


def test_rows_must_start_at_the_watermark() -> None:
    kv = SequenceKV(GEOMETRY, CAPACITY)
    with pytest.raises(AssertionError, match="start at the watermark"):
        kv.record(1, [Span(2, 3, 0, 1, (0,))], states_kept=False)


@given(cases(), st.integers(0, NUM_SEGMENTS))
def test_taking_states(case: Case, above: int) -> None:
    kv = case.kv
    for block in range(CAPACITY // BLOCK):
        for exit in range(1, NUM_SEGMENTS):
            kv.states[block, exit] = Cell((0,))
    resume = kv.resume.copy()
    stale = kv.take_stale_states(0, CAPACITY)
    used = {(position // BLOCK, int(exit)) for position, exit in enumerate(resume) if exit}
    assert set(kv.states) == used, "those stay that some token resumes from"
    assert len(stale) == CAPACITY // BLOCK * (NUM_SEGMENTS - 1) - len(used)
    kv.take_states(above)
    assert set(kv.states) == {place for place in used if place[1] <= above}
    assert kv.resume.tolist() == [exit if exit <= above else 0 for exit in resume.tolist()]


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=CAPACITY), st.data())
def test_uniform_against_the_oracle(row: list[int], data: st.DataObject) -> None:
    """It remembers how far it has looked, and is asked again and again."""
    kv = SequenceKV(GEOMETRY, CAPACITY)
    kv.settings[0, : len(row)] = row
    for _ in range(4):
        stop, wanted = data.draw(st.integers(0, len(row))), data.draw(st.integers(0, 1))
        if row[0] not in (-1, wanted) and stop == 0:
            continue  # no token: either answer
        told = all(setting in (-1, wanted) for setting in row[:stop])
        assert kv.uniform(0, stop, wanted) == told
        unset = [place for place, setting in enumerate(row) if setting == -1]
        if unset and row[0] != -1:
            row[unset[0]] = row[0]  # computed meanwhile
            kv.settings[0, unset[0]] = row[0]


@given(cases())
def test_first_difference(case: Case) -> None:
    kv = case.kv
    expected = None
    for segment in reversed(range(case.exit)):
        if any(int(setting) not in (-1, case.target[segment]) for setting in kv.settings[segment, : case.stop]):
            expected = segment
    assert kv.first_difference(case.target, case.stop) == expected
    if expected is not None:
        kv.forget_settings(expected)
        assert kv.first_difference(case.target, case.stop) is None
        assert (kv.settings[expected:] == -1).all()


def test_keys_follow_the_tokens_and_the_root() -> None:
    one, other = SequenceKV(GEOMETRY, CAPACITY), SequenceKV(GEOMETRY, CAPACITY)
    tokens = list(range(12))
    assert one.block_key("kv", (0,), 2, tokens) == other.block_key("kv", (0,), 2, list(tokens))
    keys = [one.block_key(kind, ids, 2, tokens) for kind in ("kv", "states", "tokens") for ids in ((0,), (1,), (0, 0))]
    assert len(set(keys)) == len(keys)
    second = one.block_key("kv", (0,), 1, tokens)
    assert second == SequenceKV(GEOMETRY, CAPACITY).block_key("kv", (0,), 1, [*tokens[:8], 5])
    assert second != SequenceKV(GEOMETRY, CAPACITY).block_key("kv", (0,), 1, [7, *tokens[1:]])
