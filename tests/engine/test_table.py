"""The view's arrays say what the requests themselves say, whatever happened to them."""

import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.budget import Budget
from sortserve.engine.errors import OverloadedError
from sortserve.engine.policies.protocol import NEVER_RAN, View
from sortserve.engine.request import Request
from sortserve.engine.step import held, shape_of, start_of
from tests.engine.small import LADDER, WantedPolicy
from tests.engine.test_scheduler import Drive

FULL = LADDER.full


def view_of(drive: Drive) -> View:
    return drive.scheduler._view(drive.now)


def same_time(shown: float, told: float) -> bool:
    return shown == told or math.isclose(shown, told, rel_tol=1e-12)


def check(drive: Drive) -> None:
    view = view_of(drive)
    requests = list(drive.scheduler.requests.values())
    assert len(view) == len(requests)
    for row, request in enumerate(requests):
        check_row(drive, view, row, request)


def check_row(drive: Drive, view: View, row: int, request: Request) -> None:
    expected = drive.scheduler._lengths.expected_left(request)
    budget, arrival = request.asked.budget, request.asked.arrival
    assert (view.running[row], view.place[row]) == (request.running, request.submodel)
    assert (view.floor[row], view.ceiling[row], view.arrival[row]) == (request.floor, request.ceiling, arrival)
    assert (view.num_prompt[row], view.num_output[row]) == (request.num_prompt, request.num_output)
    assert view.known[row] == len(request.tokens)
    assert view.expected_left[row] == expected
    assert view.computed[row].tolist() == request.kv.watermark
    assert view.exact[row] == (request.kv_mode == "exact")
    assert view.tokens_since_switch[row] == request.num_output - request.last_switch
    assert view.budgeted[row] == (budget is not None)
    assert view.strict[row] == (budget is not None and budget.policy == "strict")
    assert same_time(view.next_due[row], request.due(expected))
    if budget is not None:
        last = request.num_output + expected
        assert same_time(view.first_due[row], budget.due(1, arrival, None, last))
        assert same_time(view.last_due[row], budget.due(last, arrival, request.first_token, last))
    else:
        assert math.isinf(view.first_due[row])
        assert math.isinf(view.last_due[row])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32).map(random.Random))
def test_the_view_says_what_the_requests_say(rng: random.Random) -> None:
    policy = WantedPolicy()
    drive = Drive(policy=policy, timed=True, num_pages=rng.choice([40, 1000]), ask_every=rng.choice([1, 4]))
    for _ in range(40):
        action = rng.choice(["submit", "step", "step", "switch", "abort"])
        if action == "submit":
            budget = rng.choice(
                [
                    None,
                    Budget(total_ms=rng.uniform(10, 9000), policy=rng.choice(["best-effort", "strict", "cut"])),
                    Budget(ttft_ms=50, tpot_ms=rng.uniform(1, 40)),
                    Budget(tpot_ms=20, total_ms=300),
                    Budget(ttft_ms=30),
                ]
            )
            fields = {"kv_mode": rng.choice([None, "exact", "reuse"]), "floor": rng.choice([None, "d1", "d4"])}
            sampling = {"ignore_eos": rng.random() < 0.5}
            try:
                drive.submit(rng.randrange(1, 12), rng.randrange(1, 12), budget=budget, sampling=sampling, **fields)
            except (OverloadedError, ValueError):
                continue
        elif action == "step":
            drive.step()
        elif action == "abort" and drive.scheduler.requests and rng.random() < 0.2:
            drive.abort(rng.choice(list(drive.scheduler.requests)))
        elif action == "switch" and drive.scheduler.requests:
            policy.wanted[rng.choice(list(drive.scheduler.requests))] = rng.randrange(FULL + 1)
        check(drive)


def test_the_table_grows() -> None:
    drive = Drive(max_waiting=1000)
    for number in range(150):
        drive.submit([number % 90], 2, budget=Budget(total_ms=1000.0 + number))
    check(drive)
    drive.abort("r3")
    drive.abort("r140")
    check(drive)
    assert np.isfinite(view_of(drive).next_due).all()


def test_a_view_beside_a_step_is_that_after_it() -> None:
    """The policy is asked while the step runs; what it sees then is what is there when its answer counts."""
    drive = Drive(timed=True, max_step_tokens=50, beside=True)
    names = [drive.submit(5, 8, budget=Budget(ttft_ms=50, tpot_ms=9)), drive.submit(3, 8, budget=Budget(tpot_ms=20))]
    for _ in range(3):
        now = drive.now
        plan = drive.scheduler.schedule(now)
        assert plan is not None
        end = now + float(drive.scheduler.cost.seconds(drive.shape(plan)))  # type: ignore[union-attr]
        drive.scheduler.beside(plan, end)
        beside = drive.scheduler._view(end, names)
        drive.now = end
        drive.take(drive.scheduler.update(plan, drive.runner.run(plan, drive.scheduler.requests), end))
        after = view_of(drive)
        for name in View.__dataclass_fields__:
            if isinstance(getattr(after, name), np.ndarray):
                assert np.allclose(getattr(beside, name), getattr(after, name), equal_nan=True), name


@pytest.mark.parametrize("place", ["d1", "d3-w50", "d6"])
def test_what_is_cached_is_what_is_found(place: str) -> None:
    """By place: the deepest place's blocks serve all shallower ones of its width, others find nothing."""
    drive = Drive()
    prompt = list(range(13))
    drive.submit(prompt, 1, submodel=place)
    drive.run()
    name = drive.submit([*prompt, 50])
    cached = view_of(drive).cached[0]
    ran = LADDER.entries[LADDER.place(place)].submodel
    for at, entry in enumerate(LADDER.entries):
        fits = entry.submodel.depth <= ran.depth and entry.submodel.widths[0] == ran.widths[0]
        assert cached[at] == (12 if fits else 0), entry.id
    assert isinstance(drive.policy, WantedPolicy)
    drive.policy.wanted[name] = LADDER.place(place)
    drive.run()
    assert drive.summary(name).cached_tokens == 12


def test_the_view_knows_a_refill_before_it_is_planned() -> None:
    """The step's shape as the policy sees it is that of the plan: 7 rows that enter at the first exit, and one more."""
    policy = WantedPolicy(LADDER.place("d1"))
    drive = Drive(policy=policy, max_step_tokens=50)
    drive.submit(6, 8)
    drive.step()
    drive.step()
    view = view_of(drive)
    assert view.place[0] != NEVER_RAN
    place = np.array([LADDER.place("d4")])
    have = held(view, place)
    shape = shape_of(view, place, have, start_of(view, place, have), view.known)
    policy.default = LADDER.place("d4")
    plan = drive.step()
    assert plan is not None
    planned = drive.shape(plan)
    for name in ("rows", "share", "widest", "context", "pairs", "sampled"):
        assert np.allclose(getattr(shape, name), getattr(planned, name)), name
    assert shape.kind == planned.kind == "refill"
