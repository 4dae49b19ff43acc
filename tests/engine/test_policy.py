"""What the policies choose: never out of bounds, cheaper for tighter budgets, and not to and fro."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.budget import Budget
from sortserve.engine.policy import Choice, FixedPolicy, SlackPolicy, View, make_policy
from sortserve.engine.predictor import StepTimes
from sortserve.engine.request import Request
from tests.engine.small import LADDER, step_seconds, step_times
from tests.engine.test_scheduler import Drive, WantedPolicy

FULL = LADDER.full
TIMES = step_times()
CHUNK = 8


def view_of(drive: Drive, times: StepTimes | None = TIMES) -> View:
    requests = list(drive.scheduler.requests.values())
    expected = [max(1, request.tokens_left) for request in requests]
    return View(drive.now, requests, expected, LADDER, drive.scheduler.settings, times, 1.0, CHUNK)


def decided(drive: Drive, name: str, policy: SlackPolicy | FixedPolicy | None = None) -> Choice:
    view = view_of(drive)
    choices = (policy or SlackPolicy()).decide(view)
    return choices[[request.id for request in view.requests].index(name)]


def place_for(total_ms: float, **fields: Any) -> int:
    drive = Drive()
    name = drive.submit(6, 10, budget=Budget(total_ms=total_ms), **fields)
    place = decided(drive, name).place
    assert place is not None
    return place


def started(place: str, **fields: Any) -> tuple[Drive, Request]:
    """A request that has run on `place` for a few tokens."""
    drive = Drive(policy=WantedPolicy(LADDER.place(place)), max_step_tokens=CHUNK)
    request = drive.request(drive.submit(4, 20, **fields))
    while request.num_output < 3:
        drive.step()
    return drive, request


# ---- fixed


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, Choice(3, "fixed")),
        ({"floor": "d6-w50"}, Choice(LADDER.place("d6-w50"), "fixed")),
        ({"submodel": "d1"}, Choice(LADDER.place("d1"), "pinned")),
        ({"budget": None}, Choice(FULL, "pinned")),
    ],
)
def test_fixed_is_clamped(fields: dict[str, Any], choice: Choice) -> None:
    drive = Drive()
    assert decided(drive, drive.submit(**fields), FixedPolicy(3)) == choice


def test_policies_by_name() -> None:
    assert (make_policy("fixed", LADDER).name, make_policy("slack", LADDER).name) == ("fixed", "slack")
    drive = Drive()
    name = drive.submit()
    fixed = make_policy("fixed", LADDER)
    assert isinstance(fixed, FixedPolicy)
    assert decided(drive, name, fixed).place == FULL
    with pytest.raises(ValueError, match=r"'best'; there are: fixed, slack"):
        make_policy("best", LADDER)


# ---- slack


@given(st.floats(1, 400), st.floats(1, 400))
def test_a_tighter_budget_gives_a_cheaper_place(one: float, other: float) -> None:
    assert place_for(min(one, other)) <= place_for(max(one, other))


def test_budgets_reach_the_whole_ladder() -> None:
    places = {place_for(float(total)) for total in range(5, 400, 5)}
    assert {0, FULL} <= places
    assert len(places) >= 5
    assert place_for(1.0, floor="d3") == LADDER.place("d3"), "late on everything: the floor"
    assert place_for(3_600_000.0) == FULL


def test_the_place_keeps_the_budget_where_one_does() -> None:
    for total in range(20, 400, 7):
        place = place_for(float(total))
        took = 1e3 * (step_seconds(place, 6) + 9 * step_seconds(place, 1))
        assert took <= total or place == 0


def test_without_a_budget_the_full_model_runs() -> None:
    drive = Drive()
    names = [drive.submit(budget=None), drive.submit(budget=None, floor="d1")]
    assert [decided(drive, name) for name in names] == [Choice(FULL, "best")] * 2
    late = drive.submit(20, 4, budget=Budget(total_ms=1))
    assert decided(drive, names[0]) == Choice(FULL, "best"), "its floor is the full model, whoever is late"
    assert decided(drive, late).place == 0


def test_before_warm_up_everything_runs_at_its_ceiling() -> None:
    drive = Drive()
    drive.submit(budget=Budget(total_ms=1))
    drive.submit(submodel="d3", budget=Budget(total_ms=1))
    choices = SlackPolicy().decide(view_of(drive, times=None))
    assert choices == [Choice(FULL, "best"), Choice(LADDER.place("d3"), "pinned")]


def test_others_are_demoted_for_a_deadline_down_to_their_floor() -> None:
    """Step time follows the deepest row, so one tight budget asks everybody down; nobody below the floor."""
    drive = Drive(max_step_tokens=32)
    floors = ["d3-w50", "d3", "d4-w50", "d6-w50"]
    others = [drive.submit([number], 12, budget=None, floor=floor) for number, floor in enumerate(floors)]
    calm = [decided(drive, name) for name in others]
    assert calm == [Choice(FULL, "best")] * 4
    tight = drive.submit([9], 12, budget=Budget(total_ms=1e3 * 12 * step_seconds(FULL, 5) * 0.9))
    assert decided(drive, tight).place not in (None, FULL)
    choices = [decided(drive, name) for name in others]
    places = [choice.place for choice in choices]
    assert all(place is not None and place >= LADDER.place(floor) for place, floor in zip(places, floors, strict=True))
    assert places[0] is not None
    assert places[0] < FULL
    assert choices[0].reason == "others"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32).map(random.Random))
def test_choices_stay_within_floor_and_ceiling(rng: random.Random) -> None:
    drive = Drive(policy=WantedPolicy(rng.randrange(FULL + 1)), max_step_tokens=32)
    for number in range(rng.randrange(1, 6)):
        budget = rng.choice(
            [None, Budget(total_ms=rng.uniform(1, 400)), Budget(ttft_ms=50, tpot_ms=rng.uniform(1, 40))]
        )
        kv_mode = rng.choice([None, "exact", "reuse"])
        floor = rng.choice([None, rng.choice(LADDER.entries).id])
        drive.submit([number, 1, 2], 9, budget=budget, kv_mode=kv_mode, floor=floor)
    for _ in range(rng.randrange(4)):
        drive.step()
        drive.now += rng.uniform(0, 0.1)
    view = view_of(drive)
    for request, choice in zip(view.requests, SlackPolicy().decide(view), strict=True):
        assert choice.place is not None
        assert request.floor <= choice.place <= request.ceiling
        if request.kv_mode == "exact" and request.submodel >= 0 and request.floor < request.ceiling:
            assert choice.place in drive.scheduler.settings.compatible(request.submodel), "exact K/V changed its widths"


@pytest.mark.parametrize("total_ms", [1.0, 50.0, 150.0, 3_600_000.0])
def test_exact_kv_keeps_the_widths(total_ms: float) -> None:
    drive, request = started("d3-w50", kv_mode="exact", budget=Budget(total_ms=total_ms))
    request.last_switch = -100
    choice = decided(drive, request.id)
    assert choice.place is not None
    assert set(LADDER.entries[choice.place].submodel.widths) == {32}
    if total_ms == 1.0:
        assert LADDER.entries[choice.place].id == "d1-w50"
    if total_ms == 3_600_000.0:
        assert LADDER.entries[choice.place].id == "d6-w50"


def test_rising_again_waits() -> None:
    drive, request = started("d3-w50")
    policy = SlackPolicy(hold_tokens=8)
    request.last_switch = request.num_output
    assert decided(drive, request.id, policy) == Choice(LADDER.place("d3-w50"), "hold")
    request.last_switch = request.num_output - 7
    assert decided(drive, request.id, policy).reason == "hold"
    request.last_switch = request.num_output - 8
    assert decided(drive, request.id, policy) == Choice(FULL, "best")


def test_going_down_does_not_wait() -> None:
    drive, request = started("d6", budget=Budget(total_ms=1.0))
    request.last_switch = request.num_output
    choice = decided(drive, request.id)
    assert choice == Choice(0, "deadline")


@pytest.mark.parametrize(("spare", "rises"), [(1.15, False), (1.3, True)])
def test_rising_again_needs_a_margin(spare: float, rises: bool) -> None:
    """Of time enough for 1.15 times what is left at full, a request at full stays there, one below does not rise."""
    for place in ("d6-w50", "d6"):
        drive, request = started(place)
        request.last_switch = -100
        left = request.tokens_left * step_seconds(FULL, 1)
        request.asked = drive.asked[request.id].__class__(
            request.id,
            request.asked.prompt,
            request.asked.sampling,
            drive.now,
            Budget(total_ms=1e3 * left * spare),
        )
        assert (decided(drive, request.id).place == FULL) == (rises or place == "d6")


def test_to_and_fro_is_rare_under_load() -> None:
    """Requests that come and go around the load at which the full model is just too slow: a switch costs a refill."""
    drive = Drive(policy=SlackPolicy(hold_tokens=8), timed=True, max_step_tokens=32, max_running=8)
    rng = random.Random(4)
    for number in range(60):
        drive.submit([number, 1], 12, budget=Budget(tpot_ms=1e3 * step_seconds(FULL, 4)))
        for _ in range(rng.randrange(1, 8)):
            drive.step()
    drive.run()
    switches = [drive.summary(name).switches for name in drive.asked]
    stats = drive.scheduler.stats()
    assert set(stats.generated_tokens) != {"d6"}, "the load must be felt"
    assert sum(switches) / len(switches) < 2
    assert max(switches) <= 4
