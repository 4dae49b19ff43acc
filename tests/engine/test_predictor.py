"""Predicted step times: the fit finds a synthetic machine again, is monotone, and its correction stays bounded."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine.predictor import Correction, StepTimes
from tests.engine.small import LADDER, SHAPE, small_ladder, step_seconds, step_times

PLACES = range(len(LADDER.entries))
BUCKETS = (1, 4, 16, 64)
SECONDS = st.floats(0, 1e-2)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=len(BUCKETS), max_size=len(BUCKETS)))
def test_fit_recovers_a_synthetic_machine(raw: list[tuple[float, float, float]]) -> None:
    """Head, layers and widths each with a cost of their own that rises with rows in any way."""
    terms = [tuple(sum(row[term] for row in raw[: place + 1]) for term in range(3)) for place in range(len(BUCKETS))]

    def measure(place: int, rows: int) -> float:
        head, layer, ffn = terms[BUCKETS.index(rows)]
        submodel = LADDER.entries[place].submodel
        return head + layer * submodel.depth + ffn * sum(submodel.widths) / SHAPE.ffn_width

    times = StepTimes.fit(LADDER, measure, BUCKETS)
    for place in PLACES:
        for rows in BUCKETS:
            assert times.step([(place, rows)]) == pytest.approx(measure(place, rows), rel=1e-6, abs=1e-9)
        half_way = times.step([(place, 10)])
        assert half_way == pytest.approx((measure(place, 4) + measure(place, 16)) / 2, rel=1e-6, abs=1e-9)
        assert times.step([(place, 128)]) == pytest.approx(2 * measure(place, 64), rel=1e-6, abs=1e-9)


@given(st.integers(0, 2**32).map(random.Random))
def test_predictions_are_monotone_whatever_was_measured(rng: random.Random) -> None:
    noisy = StepTimes.fit(LADDER, lambda place, rows: step_seconds(place, rows) * rng.uniform(0.5, 2.0), BUCKETS)
    for place in PLACES:
        seconds = [noisy.step([(place, rows)]) for rows in range(1, 100, 3)]
        assert all(a <= b + 1e-12 for a, b in pairwise(seconds))
    for small in PLACES:
        for big in PLACES:
            a, b = LADDER.entries[small].submodel, LADDER.entries[big].submodel
            if a.depth <= b.depth and a.widths[0] <= b.widths[0]:
                assert noisy.step([(small, 4)]) <= noisy.step([(big, 4)]) + 1e-12


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.integers(1, 12)), min_size=1, max_size=4))
def test_a_mixed_step_lies_between_its_extremes(rows: list[tuple[int, int]]) -> None:
    times = step_times()
    mixed = times.step(rows)
    total = sum(count for _, count in rows)
    assert mixed <= times.step([(LADDER.full, total)]) + 1e-12
    assert mixed >= times.step([(0, total)]) - 1e-12
    assert mixed >= max(times.step([row]) for row in rows) - 1e-12
    assert times.step([*rows, (LADDER.full, 0)]) == pytest.approx(mixed), "no rows cost nothing"
    assert times.step(reversed(rows)) == pytest.approx(mixed)


def test_one_deep_row_makes_all_wait_for_the_deep_weights() -> None:
    times = step_times()
    deep, shallow = LADDER.full, LADDER.place("d1")
    assert times.step([(deep, 1), (shallow, 7)]) > times.step([(deep, 1)])
    saved_by_one = times.step([(deep, 8)]) - times.step([(deep, 7), (shallow, 1)])
    saved_by_all = times.step([(deep, 8)]) - times.step([(shallow, 8)])
    assert saved_by_one < saved_by_all / 8


def test_no_rows_take_no_time() -> None:
    assert step_times().step([]) == step_times().step([(0, 0)]) == 0.0
    assert step_times().prefill(0, 0, 8) == 0.0


@given(st.integers(0, 50), st.integers(1, 20), st.sampled_from(PLACES))
def test_prefill_is_a_sum_of_chunks(num_tokens: int, chunk: int, place: int) -> None:
    times, left, seconds = step_times(), num_tokens, 0.0
    while left > 0:
        seconds += times.step([(place, min(chunk, left))])
        left -= chunk
    assert times.prefill(place, num_tokens, chunk) == pytest.approx(seconds)


@pytest.mark.parametrize("widths", [(64,), (32, 64), (16, 32, 48, 64)])
def test_ladders_of_few_entries_are_fitted(widths: tuple[int, ...]) -> None:
    """With one width, width and depth cannot be told apart; what was measured still comes out."""
    ladder = small_ladder(widths)
    times = step_times(ladder)
    for place in range(len(ladder.entries)):
        for rows in (1, 16, 40):
            assert times.step([(place, rows)]) == pytest.approx(step_seconds(place, rows, ladder))


# ---- correction

OUTLIERS = st.floats(-1, 1e6) | st.sampled_from([0.0, 1e-9, 1e9])


@given(st.lists(st.tuples(OUTLIERS, OUTLIERS), max_size=60))
def test_the_factor_is_bounded_whatever_is_measured(steps: list[tuple[float, float]]) -> None:
    correction = Correction()
    for predicted, measured in steps:
        before = correction.factor
        correction.observe(predicted, measured)
        assert 1 / correction.bound <= correction.factor <= correction.bound
        assert abs(correction.factor - before) <= correction.weight * (correction.bound - 1 / correction.bound) + 1e-12
        if predicted <= 0 or measured <= 0:
            assert correction.factor == before
    assert len(correction.errors) <= correction.keep


@given(st.floats(0.3, 3.5))
def test_the_factor_finds_a_machine_that_is_slower_or_faster(ratio: float) -> None:
    correction = Correction()
    for _ in range(400):
        correction.observe(0.01, 0.01 * ratio)
    assert correction.factor == pytest.approx(ratio, rel=1e-3)
    assert correction.errors[-1] == pytest.approx(0.0, abs=1e-3)
    correction.observe(0.01, 1000.0)  # the machine slept
    assert correction.factor <= ratio + correction.weight * correction.bound


def test_errors_are_those_of_the_corrected_prediction() -> None:
    correction = Correction(factor=2.0, keep=2)
    for _ in range(3):
        correction.observe(0.01, 0.02)
    assert correction.errors == pytest.approx([0.0, 0.0])
