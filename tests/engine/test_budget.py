"""When tokens are due, and when a budget is met: the rules of HTTP_API, spelled out naively beside the code."""

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sortserve.engine.budget import Budget
from sortserve.engine.errors import RequestError
from sortserve.engine.sampling import SamplingParams

MS = st.none() | st.integers(1, 100)
ARRIVAL = 1000.0


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    total, ttft, tpot = draw(MS), draw(MS), draw(MS)
    assume((total, ttft, tpot) != (None, None, None))
    return Budget(total, ttft, tpot)


@st.composite
def answers(draw: st.DrawFn) -> list[float]:
    """Times of the tokens, in milliseconds from arrival."""
    gaps = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    return [float(sum(gaps[: count + 1])) for count in range(len(gaps))]


def naive_met(budget: Budget, times: list[float]) -> bool:
    """HTTP_API, "When is it met?", in milliseconds from arrival. A first token that came early is credit."""
    good = True
    if budget.ttft_ms is not None:
        good &= times[0] <= budget.ttft_ms
    if budget.tpot_ms is not None:
        started = times[0] if budget.ttft_ms is None else max(times[0], budget.ttft_ms)
        good &= times[-1] <= started + (len(times) - 1) * budget.tpot_ms
    if budget.total_ms is not None:
        good &= times[-1] <= budget.total_ms
    return good


@given(budgets(), answers())
def test_met(budget: Budget, times: list[float]) -> None:
    # a hair earlier, the last more than the first, whose clock it may run on, so that rounding in seconds cannot turn
    # "just in time" into "late"; whole ms are far apart
    first, last = ARRIVAL + times[0] / 1e3 - 1e-9, ARRIVAL + times[-1] / 1e3 - (2e-9 if len(times) > 1 else 1e-9)
    assert budget.met(ARRIVAL, first, last, len(times)) == naive_met(budget, times)


@given(budgets(), answers())
def test_met_is_exactly_every_constraint_by_its_due_time(budget: Budget, times: list[float]) -> None:
    seconds = [ARRIVAL + time / 1e3 for time in times]
    first_due = budget.due(1, ARRIVAL, None, len(seconds))
    last_due = budget.due(len(seconds), ARRIVAL, seconds[0], len(seconds))
    kept = seconds[0] <= first_due and seconds[-1] <= last_due
    assert budget.met(ARRIVAL, seconds[0], seconds[-1], len(seconds)) == kept


@given(budgets(), st.floats(0, 100), st.integers(2, 9))
def test_due_times_rise_with_the_token(budget: Budget, first_ms: float, last: int) -> None:
    first = ARRIVAL + first_ms / 1e3
    due = [budget.due(number, ARRIVAL, first, 10**6) for number in range(1, last + 1)]
    if budget.tpot_ms is not None and budget.ttft_ms is not None:
        assert due == sorted(due)
        assert due[-1] == pytest.approx(max(first, due[0]) + (last - 1) * budget.tpot_ms / 1e3)
    elif budget.tpot_ms is not None:
        assert due[0] == math.inf
        assert due[1:] == sorted(due[1:])
        assert due[-1] == pytest.approx(first + (last - 1) * budget.tpot_ms / 1e3)
    else:
        assert all(time == math.inf for time in due[1:]), "only the last token is due by a total"


@given(st.integers(1, 50), st.integers(1, 50), st.integers(2, 6))
def test_an_early_first_token_is_credit(ttft: int, tpot: int, count: int) -> None:
    budget = Budget(ttft_ms=ttft, tpot_ms=tpot)
    early = budget.due(count, ARRIVAL, ARRIVAL, count)
    on_time = budget.due(count, ARRIVAL, ARRIVAL + ttft / 1e3, count)
    late = budget.due(count, ARRIVAL, ARRIVAL + 2 * ttft / 1e3, count)
    assert early == on_time == pytest.approx(ARRIVAL + (ttft + (count - 1) * tpot) / 1e3)
    assert late == pytest.approx(on_time + ttft / 1e3)


def test_the_clock_of_the_tpot_starts_at_the_first_token() -> None:
    budget = Budget(tpot_ms=10)
    assert budget.due(5, ARRIVAL, None, 5) == math.inf
    assert budget.due(5, ARRIVAL, ARRIVAL + 3, 5) == pytest.approx(ARRIVAL + 3.04)


def test_an_answer_without_a_token() -> None:
    """The docstring and the code disagreed. One that was cut or aborted before its first token has kept nothing; one that
    was asked for no token can only break the total."""
    for budget in (Budget(total_ms=10), Budget(ttft_ms=10), Budget(tpot_ms=10)):
        assert not budget.met(ARRIVAL, None, None, 0)
    assert Budget(total_ms=10).within_total(ARRIVAL, ARRIVAL + 0.00999)
    assert not Budget(total_ms=10).within_total(ARRIVAL, ARRIVAL + 0.011)
    assert Budget(ttft_ms=10).within_total(ARRIVAL, ARRIVAL + 99)


@pytest.mark.parametrize("value", [0, -1, 3_600_001, math.nan, math.inf, 10**400], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("name", ["total_ms", "ttft_ms", "tpot_ms"])
def test_values_out_of_range_are_told(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=rf"{name} is .*3600000") as raised:
        Budget(**{name: value})  # type: ignore[arg-type]
    assert raised.value.param == ("latency_budget_ms" if name == "total_ms" else f"latency_budget_{name}")
    assert Budget(**{name: 3_600_000.0}).policy == "best-effort"  # type: ignore[arg-type]


def test_a_budget_needs_a_constraint_and_a_known_policy() -> None:
    with pytest.raises(RequestError, match="total_ms, ttft_ms or tpot_ms"):
        Budget()
    with pytest.raises(RequestError, match="'soft', must be best-effort, strict or cut"):
        Budget(total_ms=1, policy="soft")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 10**400),
        ("temperature", 10**5000),
        ("temperature", -(10**400)),
        ("max_tokens", 10**400),
        ("top_p", math.nan),
        ("top_p", math.inf),
        ("top_p", 0.0),
        ("min_p", -math.inf),
        ("repetition_penalty", 0.0),
        ("seed", 2**63),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value:.3g}" if isinstance(value, float) else "huge",
)
def test_sampling_values_out_of_range_are_told(name: str, value: Any) -> None:
    """A huge integer from JSON was an OverflowError in `math.isfinite`, and over 4,300 digits it cannot be printed."""
    with pytest.raises(RequestError, match=f"{name} is .* must be in") as raised:
        SamplingParams(**{name: value})
    assert raised.value.param == name
    with pytest.raises(RequestError, match="logit_bias is"):
        SamplingParams(logit_bias={1: 10**400})
