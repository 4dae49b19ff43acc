"""Reading traces, cutting and stretching them, drawing budgets."""

from pathlib import Path

import numpy as np
import pytest

from sortserve.engine.simulator.traces import BudgetMix, Trace, Unloaded, draw_budgets, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:51.2224670,879,0
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3052, "input_length": 7322, "output_length": 490, "hash_ids": [0]}
"""


def _trace(count: int = 50) -> Trace:
    rng = np.random.default_rng(3)
    arrival = np.sort(rng.uniform(0, 100, count))
    return Trace(arrival - arrival[0], rng.integers(1, 900, count), rng.integers(1, 90, count))


def test_azure_is_sorted_and_has_at_least_a_token(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    trace = read_trace(tmp_path / "a.csv")
    assert trace.arrival == pytest.approx([0.0, 4.314579, 4.541877], abs=1e-6)
    assert trace.num_prompt.tolist() == [374, 396, 879]
    assert trace.num_output.tolist() == [44, 109, 1]


def test_mooncake_has_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    trace = read_trace(tmp_path / "m.jsonl")
    assert trace.arrival.tolist() == [0.0, 3.052]
    assert trace.num_prompt.tolist() == [6758, 7322]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "columns are"),
        (AZURE + "yesterday,1,2\n", "line 5"),
        ('{"timestamp": 1}\n', "line 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "empty"),
    ],
)
def test_what_is_no_trace_is_told_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_trace(tmp_path / "t")


def test_window_counts_from_its_start() -> None:
    window = _trace().window(20.0, 30.0)
    assert window.arrival[0] >= 0
    assert window.arrival[-1] < 30.0
    assert len(window) == ((_trace().arrival >= 20) & (_trace().arrival < 50)).sum()


def test_stretch_has_the_exact_rate_goes_round_and_keeps_the_form_of_bursts() -> None:
    trace = _trace()
    taken = trace.stretch(40, 20, 7.0)
    assert len(taken) == 20
    assert taken.arrival[0] == 0
    assert taken.seconds == pytest.approx(7.0)
    assert (np.diff(taken.arrival) >= 0).all()
    assert taken.num_prompt.tolist() == [*trace.num_prompt[40:], *trace.num_prompt[:10]]
    gaps, scaled = np.diff(trace.arrival[40:]), np.diff(taken.arrival[:10])
    assert scaled / gaps == pytest.approx(np.full(9, scaled[0] / gaps[0]))
    with pytest.raises(ValueError, match="51 requests are asked for, the trace has 50"):
        trace.stretch(0, 51, 1.0)


def test_scaling() -> None:
    trace = _trace()
    assert trace.at_rate(9.0).rate == pytest.approx(9.0)
    small = trace.scaled_lengths(1 / 8, most_prompt=64)
    assert small.num_prompt.max() == 64
    assert small.num_output.min() == 1
    assert trace.evened(1).rate == pytest.approx(trace.rate, rel=0.2)


def test_budgets_follow_their_formulas_and_the_seed() -> None:
    trace = _trace(4000)
    unloaded = Unloaded(0.01, 1e-4, 0.005)
    mix = BudgetMix(tightness=(1.0, 1.0), strict=0.5)
    drawn = draw_budgets(trace, unloaded, 7, mix)
    kinds = np.array(drawn.kind)
    for kind, share in (("interactive", 0.5), ("relaxed", 0.4), ("none", 0.1)):
        assert (kinds == kind).mean() == pytest.approx(share, abs=0.03), kind
    one = int(np.flatnonzero(kinds == "interactive")[0])
    assert drawn.ttft[one] == pytest.approx(0.25 + 10 * (0.01 + 1e-4 * trace.num_prompt[one]))
    assert drawn.tpot[one] == pytest.approx(0.05)
    one = int(np.flatnonzero(kinds == "relaxed")[0])
    alone = 0.01 + 1e-4 * trace.num_prompt[one] + 0.005 * (trace.num_output[one] - 1)
    assert drawn.total[one] == pytest.approx(1.0 + 10 * alone)
    assert drawn.strict[drawn.budgeted].mean() == pytest.approx(0.5, abs=0.04)
    assert not drawn.strict[~drawn.budgeted].any()
    again, other = draw_budgets(trace, unloaded, 7), draw_budgets(trace, unloaded, 8)
    assert (again.ttft == draw_budgets(trace.scaled_time(0.5), unloaded, 7).ttft).all()
    assert (again.ttft != other.ttft).any()
