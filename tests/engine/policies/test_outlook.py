"""What lies ahead: work from the present state, against the filling of real steps, and predicted times against stepping."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.engine.policies.outlook import Outlook, first_difference
from sortserve.engine.policies.prices import Prices
from sortserve.engine.policies.protocol import NEVER_RAN, View
from sortserve.engine.rungs import Rungs
from sortserve.engine.step import held, rows_of, start_of
from tests.engine.policies.views import DEPTHS, WIDTHS, machine, view_of


def outlook_of(view: View) -> Outlook:
    return Outlook(view, Prices.of(view.cost, view.rungs, view.step_tokens))


@st.composite
def states(draw: st.DrawFn) -> tuple[Rungs, list[dict[str, object]]]:
    rungs = draw(st.sampled_from([DEPTHS, WIDTHS]))
    requests: list[dict[str, object]] = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = draw(st.integers(1, 20))
        fields: dict[str, object] = {"num_prompt": prompt}
        if draw(st.booleans()):
            place = draw(st.integers(0, rungs.full))
            known = prompt + draw(st.integers(0, 5))
            marks = sorted((draw(st.integers(0, known)) for _ in range(rungs.num_segments)), reverse=True)
            fields |= {"place": place, "running": True, "num_output": known - prompt}
            fields |= {"computed": np.array(marks), "exact": draw(st.booleans()), "resumable": draw(st.booleans())}
        else:
            fields["cached"] = np.array([draw(st.integers(0, 20)) for _ in rungs.exits])
        requests.append(fields)
    return rungs, requests


@settings(max_examples=150, deadline=None)
@given(states())
def test_work_is_what_the_step_would_run(state: tuple[Rungs, list[dict[str, object]]]) -> None:
    rungs, requests = state
    view = view_of(*requests, rungs=rungs)
    outlook = outlook_of(view)
    for place in range(rungs.full + 1):
        at = np.full(len(view), place)
        have = held(view, at)
        start = start_of(view, at, have)
        rows = rows_of(view, at, have, start, view.known)
        assert outlook.rows[:, place].tolist() == (view.known - start).tolist()
        assert outlook.work[:, place].tolist() == (rows @ rungs.layers).tolist()


def test_first_difference_is_where_widths_part() -> None:
    depths, widths = first_difference(DEPTHS), first_difference(WIDTHS)
    assert (depths == DEPTHS.num_segments).all(), "depth alone changes nothing below"
    differs = [(place, other) for place in range(8) for other in range(8) if widths[place, other] == 0]
    assert len(differs) == 32  # half of all pairs have other widths, and these part in the first segment


def test_rows_that_need_one_token_take_part_in_every_step() -> None:
    view = view_of({"ran": 3, "total": 9.0}, {"ran": 3, "total": 9.0})
    forecast = outlook_of(view).foresee(np.array([[3, 3], [0, 0], [0, 3]]), np.full(3, 64.0))
    assert forecast.step == pytest.approx([7e-3, 2e-3, 7e-3])  # 6 layers, 1, and the deepest row decides
    assert forecast.last[0] == pytest.approx([16 * 7e-3] * 2)


def test_prompts_come_in_order_of_deadlines_and_share_steps() -> None:
    view = view_of({"total": 5.0, "num_prompt": 64}, {"total": 3.0, "num_prompt": 32}, {"num_prompt": 96})
    forecast = outlook_of(view).foresee(np.full((1, 3), 3), np.array([32.0]))
    step = 1e-3 + 6 * 32e-4
    assert forecast.first[0] / step == pytest.approx([3, 1, 6], rel=0.01)


def test_who_sits_out_gets_nothing_and_costs_nothing() -> None:
    view = view_of({"ran": 3}, {"ran": 0}, {"num_prompt": 500})
    forecast = outlook_of(view).foresee(np.array([[-1, 0, -1]]), np.array([64.0]))
    assert forecast.step == pytest.approx([2e-3])
    assert np.isinf(forecast.last[0]).tolist() == [True, False, True]


def test_nobody_starts_before_there_is_a_place() -> None:
    many = [{"ran": 3}] * 4 + [{"num_prompt": 1, "total": 9.0}]
    full, free = view_of(*many, max_running=4), view_of(*many, max_running=5)
    waits, starts = (
        outlook_of(view).foresee(np.full((1, 5), 3), np.array([64.0])).first[0, 4] for view in (full, free)
    )
    assert starts == pytest.approx(7e-3, rel=0.2)
    assert waits > 4 * starts


def test_hopeless_is_what_no_empty_machine_could_do() -> None:
    alone = 6 * 32e-4 + 15 * 7e-3  # 32 rows at the price of a full step, then 15 steps of one row
    view = view_of({"total": alone * 0.9}, {"total": alone * 1.1}, {"total": alone * 0.9, "ran": 3}, {})
    outlook = outlook_of(view)
    assert outlook.hopeless(np.full(4, 3)).tolist() == [True, False, True, False]
    assert not outlook.hopeless(np.full(4, 2)).any()


def test_costs_of_a_step_down_and_of_a_refill() -> None:
    view = view_of({"ran": 1}, {"ran": 3}, cost=machine(DEPTHS, weights=1e-5, base=0))
    cost = outlook_of(view).cost
    assert (np.diff(cost, axis=1) > 0).all()
    refill = 32 * 3 * 1e-4  # 32 tokens through the 3 layers above the third
    assert cost[0, 3] - cost[1, 3] == pytest.approx(refill, rel=0.01)


def test_an_empty_view() -> None:
    view = view_of()
    assert len(view) == 0
    outlook = outlook_of(view)
    assert outlook.foresee(np.zeros((2, 0), np.int64), np.full(2, 64.0)).last.shape == (2, 0)
    assert NEVER_RAN == -1
