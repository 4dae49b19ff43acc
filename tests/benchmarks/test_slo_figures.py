"""The trace benchmark's arithmetic on outcomes made up here."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.slo import figures, load
from benchmarks.slo.capacity import fit_unloaded, throughput
from benchmarks.slo.figures import Answered
from benchmarks.slo.results import checks
from benchmarks.slo.wire import Outcome
from sortserve.engine.budget import Budget
from sortserve.engine.simulator.traces import Trace
from tests.engine.policies.traces import workload

QUALITIES = {"d2": 0.8, "d4": 1.0}


def quality_of(tokens: Mapping[str, int]) -> float | None:
    return sum(QUALITIES[name] * count for name, count in tokens.items()) / sum(tokens.values())


def outcome(due: float = 10.0, **changed: Any) -> Outcome:
    """Ten tokens, half each of d2 and d4: the first 0.2 s after it was due, the last 0.9 s later, and no lag."""
    told = {
        "submodels": {"d2": 5, "d4": 5},
        "switches": 1,
        "refilled_tokens": 7,
        "elapsed_ms": 1000.0,
        "met": changed.pop("met", True),
    }
    usage = json.dumps({"choices": [], "usage": {}, "sortserve": told}).encode()
    fields: dict[str, Any] = {
        "number": 0,
        "due": due,
        "sent": due,
        "first": due + 0.2,
        "last": due + 1.1,
        "status": 200,
        "headers": {"x-latency-predicted-ms": "800"},
        "tail": b'text"}]}\n\n\r\n' + b"9c\r\ndata: " + usage + b"\n\n\r\n9\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
    }
    return Outcome(**fields | changed)


def test_one_answer() -> None:
    found = figures.answered(outcome(sent=10.003), "interactive", Budget(ttft_ms=250, tpot_ms=100), quality_of)
    assert (found.complete, found.refused, found.met, found.met_by_client) == (True, False, True, True)
    assert found.quality == pytest.approx(0.9)
    assert [found.lag, found.ttft] == pytest.approx([0.003, 0.2])
    assert [found.tpot, found.total] == pytest.approx([0.1, 1.1])
    assert found.predicted_error == pytest.approx(-0.2)
    assert (found.switches, found.refilled) == (1, 7)


@pytest.mark.parametrize(
    ("budget", "met"),
    [
        (Budget(ttft_ms=199), False),
        (Budget(tpot_ms=99), False),
        (Budget(ttft_ms=400, tpot_ms=80), True),  # a first token that came early is credit
        (Budget(total_ms=1099), False),
        (Budget(total_ms=1101), True),
    ],
)
def test_the_clients_clock_runs_from_when_it_was_due(budget: Budget, met: bool) -> None:
    assert figures.answered(outcome(), "relaxed", budget, quality_of).met_by_client is met


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"status": 429, "first": -1.0, "last": -1.0, "tail": b'{"error": {"code": "overloaded"}}'}, True),
        ({"status": 0, "last": -1.0}, False),
        ({"status": 200, "last": -1.0, "tail": b'data: {"error": {}}\n\ndata: [DONE]\n\n'}, False),
        ({"tail": b'data: {"error": {"message": "died"}}\n\ndata: [DONE]\n\n'}, False),
        ({"status": 503, "first": -1.0, "last": -1.0, "tail": b"{}"}, False),
    ],
)
def test_what_has_no_end_is_worth_nothing(changed: dict[str, Any], refused: bool) -> None:
    found = figures.answered(outcome(**changed), "relaxed", Budget(total_ms=9e5), quality_of)
    assert (found.complete, found.met, found.met_by_client, found.refused) == (False, False, False, refused)
    assert found.quality is None
    assert figures.attainment([found]) == 0.0


def request(due: float = 0.0, met: bool = True, kind: str = "relaxed", **more: Any) -> Answered:
    return Answered(kind, due, more.pop("lag", 0.0), met=met, met_by_client=met, **more)


def test_attainment_and_goodput_leave_out_what_has_no_budget() -> None:
    requests = [
        request(quality=0.8),
        request(quality=1.0, met=False),
        request(met=False, refused=True),
        request(kind="none", met=True, quality=1.0),
        request(quality=0.9, kind="interactive"),
    ]
    assert figures.attainment(requests) == 0.5
    assert figures.goodput(requests, 2.0) == pytest.approx(0.85)
    assert figures.mean_quality(requests) == pytest.approx(0.9), "late ones count, refused ones do not"
    assert figures.attainment([request(kind="none")]) is None
    assert figures.mean_quality([request(kind="none", quality=1.0)]) is None


def test_the_worst_window_is_found_wherever_it_begins() -> None:
    """Two a second for 100 s; all between 41 and 56 are missed."""
    requests = [request(due / 2, met=not 41 <= due / 2 < 56) for due in range(200)]
    assert figures.worst_window(requests, 100.0, 30.0) == pytest.approx(0.5)
    assert figures.worst_window(requests, 100.0, 15.0) == 0.0
    late = [request(due / 2, met=due / 2 < 90) for due in range(200)]
    assert figures.worst_window(late, 100.0, 30.0) == pytest.approx(2 / 3), "the last window counts too"
    assert figures.worst_window(requests[:80], 20.0, 30.0) == 1.0, "a short replay is one window"
    assert figures.worst_window(requests[:19], 100.0, 30.0) is None
    sparse = [request(due * 10.0) for due in range(30)]
    assert figures.worst_window(sparse, 300.0, 30.0) is None, "three in a window say nothing"


@given(
    st.lists(st.tuples(st.floats(0, 100, exclude_max=True), st.booleans()), min_size=20, max_size=60),
    st.integers(5, 100),
)
def test_no_window_is_worse_than_the_worst(requests: list[tuple[float, bool]], window: int) -> None:
    made = [request(due, met) for due, met in requests]
    found = figures.worst_window(made, 100.0, float(window))
    for start in np.linspace(0, 100 - window, 23):
        inside = [met for due, met in requests if start <= due < start + window]
        if len(inside) >= 20:
            assert found is not None
            assert sum(inside) / len(inside) >= found - 1e-9


def test_quantiles_are_of_what_happened() -> None:
    assert figures.quantiles([None, 1.0, 2.0, 3.0], 1e3)["p50"] == 2000.0
    assert figures.quantiles([None]) == {"p50": None, "p95": None, "p99": None}


def test_a_late_client_makes_a_run_void() -> None:
    on_time = [0.001] * 985
    assert not figures.is_void([*on_time, *[0.020] * 9])
    assert figures.is_void([*on_time, *[0.020] * 15])
    assert not figures.is_void([0.0049] * 100)
    assert figures.is_void([0.0051] * 100)
    summary = figures.summary([request(due / 2, lag=0.006) for due in range(100)], 50.0)
    assert summary["void"] is True


def test_a_summary_has_both_clocks_and_all_classes() -> None:
    requests = [figures.answered(outcome(float(n)), "relaxed", Budget(total_ms=900), quality_of) for n in range(40)]
    requests += [request(float(n), met=n % 2 == 0, kind="interactive", quality=1.0) for n in range(40)]
    found = figures.summary(requests, 40.0)
    assert (found["attainment"], found["attainment_by_client"]) == (0.75, 0.25)
    assert (found["attainment_interactive"], found["attainment_relaxed"]) == (0.5, 1.0)
    assert found["goodput_per_second"] == pytest.approx((40 * 0.9 + 20) / 40)
    assert found["switches"] == 40
    json.dumps(found, allow_nan=False)


def closed(number: int, sent: float, last: float) -> Outcome:
    return Outcome(number, 0.0, sent, sent, last, 200 if last >= 0 else 0, {}, b"")


def test_throughput_is_between_two_answers() -> None:
    """One answer every 0.5 s from 1 s on, of four and six tokens in turn; what fills the batch does not count."""
    trace = Trace(np.zeros(2), np.array([9, 9]), np.array([4, 6]))
    outcomes = [closed(number % 2, 0.5 * number, 1.0 + 0.5 * number) for number in range(17)]
    outcomes += [closed(0, 8.6, -1.0)]
    assert throughput(outcomes[::-1], trace, 9.0) == pytest.approx((2.0, 10.0), rel=0.05)
    with pytest.raises(RuntimeError, match="too few"):
        throughput(outcomes[:3], trace, 9.0)
    with pytest.raises(RuntimeError, match="got 400: no"):
        throughput([*outcomes, Outcome(0, 0.0, 0.0, -1.0, -1.0, 400, {}, b"no")], trace, 9.0)
    told = b'{"prompt_tokens_details":{"cached_tokens":16}}'
    with pytest.raises(RuntimeError, match="prefix cache"):
        throughput([*outcomes, Outcome(0, 0.0, 0.0, 1.0, 2.0, 200, {}, told)], trace, 9.0)


def test_unloaded_times_are_a_line_through_medians() -> None:
    lengths = np.repeat([10.0, 100.0, 200.0], 3)
    first = 0.02 + 0.001 * lengths
    first[0] = 5.0  # one that the machine held up
    found = fit_unloaded(lengths, first, np.array([0.004, 0.005, 0.1]))
    assert [found.first, found.prompt_token] == pytest.approx([0.02, 0.001])
    assert found.token == 0.005
    flat = fit_unloaded(lengths, np.full(9, 0.03), np.array([0.005]))
    assert [flat.first, flat.prompt_token] == pytest.approx([0.03, 0.0])
    with pytest.raises(RuntimeError, match="no lone request"):
        fit_unloaded(np.array([]), np.array([]), np.array([]))


def point(policy: str, load: float, **changed: Any) -> dict[str, Any]:
    """A point where the floor does 3x of the full model."""
    good = {"void": False, "attainment": 0.99, "attainment_worst_30s": 0.985, "mean_quality": 0.995}
    return {"policy": policy, "load": load, "load_of_floor": load / 3, **good, **changed}


def test_targets_are_judged_by_the_points_that_count() -> None:
    capacity = [{"submodel": "d2", "requests_per_second": 30.0}, {"submodel": "d4", "requests_per_second": 10.0}]
    head = {"capacity": capacity, "floor": "d2"}
    points = [point("slack", 0.8), point("slack", 2.4, mean_quality=0.8), point("fixed", 2.4, attainment=0.3)]
    assert list(checks(head, points).values()) == [True, True, True, True]
    assert list(checks(head, [point("slack", 0.8, mean_quality=0.98)]).values()) == [True, True, False]
    assert list(checks(head, [point("slack", 2.4, attainment_worst_30s=0.97)]).values()) == [True, False]
    assert list(checks(head, [point("slack", 2.4, attainment_worst_30s=0.97, void=True)]).values()) == [True]
    assert list(checks(head, [point("slack", 3.0, attainment_worst_30s=0.1)]).values()) == [True]
    assert list(checks(head, [point("fixed", 2.4, attainment=0.6)]).values()) == [True, False]
    assert not checks({"capacity": capacity, "floor": "d4"}, []).popitem()[1]


def test_waits_until_no_budget_can_be_kept() -> None:
    """By a total, by the first token and the pace, and by nothing."""
    never = np.inf
    work = workload([1.0, 2.0, 3.0], 10, [5, 3, 9], total=[20.0, never, never], ttft=[never, 4.0, never])
    assert load.latest_due(replace(work, tpot=np.array([never, 0.5, never]))) == 21.0
    assert load.latest_due(replace(work, tpot=np.array([never, 9.0, never]))) == 2.0 + 4.0 + 2 * 9.0
    assert load.latest_due(workload([1.0], 10, 5)) == 0.0
