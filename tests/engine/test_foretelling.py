"""What requests are told when they begin, against what comes: simulated, with a perfect cost model, so that only the load
is to be foretold."""

from dataclasses import replace

import numpy as np
import pytest

from sortserve.engine.cost import CostTable
from sortserve.engine.foretelling import Foreteller
from sortserve.engine.traffic import MOST, SECONDS, Traffic
from tests.engine.policies.test_on_traces import burst
from tests.engine.policies.traces import config, run
from tests.engine.policies.views import DEPTHS


def machine() -> CostTable:
    """2 ms a step, and per layer 0.1 ms up to 16 rows, then in proportion: most of a prompt comes on top of others' rows."""
    buckets = np.array([1.0, 16.0, 4096.0])
    layer = np.maximum(1e-4, 1e-4 / 16 * buckets)
    return CostTable(DEPTHS.layers, buckets, layer, 0 * layer, 0 * layer, base=2e-3)


@pytest.mark.parametrize(
    ("policy", "rate"), [("fixed", 40.0), ("fixed", 80.0), ("reject-only", 200.0), ("slack", 120.0)]
)
def test_totals_are_foretold_under_load(policy: str, rate: float) -> None:
    """Without the prompts that go on coming and without the factor of the last answers the median is 10 to 20 % too low
    for `fixed`; with them within 5 %, and half of all within 20 %."""
    work = burst(rate, 600, seed=3)
    work = replace(work, num_output=work.num_output * 4, total=work.total * 2)
    records = run(policy, work, config(machine(), predicts=True))
    ended = records.last_token > 0
    taken = (records.last_token - work.arrival)[ended]
    ratio = records.predicted[ended] / taken
    assert ended.sum() > 100
    assert abs(np.median(ratio) - 1) < 0.05
    assert np.median(np.abs(ratio - 1)) < 0.2
    assert 0.75 < (records.predicted_p90[ended] >= taken).mean() < 0.97


def test_what_the_last_answers_took_corrects_the_next_within_bounds() -> None:
    foreteller = Foreteller()
    for taken in (1.8, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0):
        foreteller.ended(1.0, taken)
    assert foreteller.factor == 1.0, "seven answers are too few"
    for never in (0.0, float("inf"), float("nan")):
        foreteller.ended(1.0, never)
    foreteller.ended(1.0, 2.0)
    assert foreteller.factor == pytest.approx(2.0)
    assert foreteller.spread > 1.0
    for _ in range(100):
        foreteller.ended(1.0, 100.0)
    assert foreteller.factor == 4.0


def test_traffic_counts_what_began_of_late() -> None:
    traffic = Traffic()
    assert (traffic.rate(5.0), traffic.rows) == (0.0, 0.0)
    for number in range(10):
        traffic.note(number * SECONDS / 10, 100 + 20 * (number % 2))
    assert traffic.rate(SECONDS * 0.95) == pytest.approx(10 / SECONDS)
    assert traffic.rows == 110
    assert traffic.rate(SECONDS * 1.45) == pytest.approx(5 / SECONDS), "five are older than that"
    assert traffic.rate(SECONDS * 10) == traffic.rows == 0.0
    for _ in range(2 * MOST):
        traffic.note(50.0, 3)
    assert traffic.rows == 3.0
    traffic.note(50.0 - SECONDS / 2, 3)  # for a moment before the end that was predicted
    assert traffic.rate(50.0) == MOST / SECONDS
    traffic.note(1.0, 8)  # the clock was set back
    assert (traffic.rate(1.0), traffic.rows) == (1 / SECONDS, 8.0)
