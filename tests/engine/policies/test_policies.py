"""What every policy keeps to, and what each decides in states made by hand."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.engine.policies.admission import PATIENCE_SECONDS, SHARE_STEPS
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Policy, Reason, View
from sortserve.engine.policies.registry import POLICY_NAMES, make_policy
from tests.engine.policies.views import DEPTHS, WIDTHS, machine, view_of

PREDICTING = tuple(name for name in POLICY_NAMES if name != "fixed")
FULL = DEPTHS.full
BOUND = machine(DEPTHS, weights=1e-5, base=1e-4)
"""A machine bound by computing: every row costs its layers."""


def decide(name: str, view: View, times: int = 1, **options: Any) -> Decision:
    """The last of several decisions about the same view, as prices need some to settle."""
    policy = make_policy(name, view.rungs, **options)
    return repeated(policy, view, times)


def repeated(policy: Policy, view: View, times: int) -> Decision:
    for _ in range(times):
        decision = policy.decide(view)
    return decision


@st.composite
def views(draw: st.DrawFn) -> View:
    rungs = draw(st.sampled_from([DEPTHS, WIDTHS]))
    requests: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 6))):
        floor = draw(st.integers(0, rungs.full))
        fields: dict[str, Any] = {"floor": floor, "ceiling": draw(st.integers(floor, rungs.full))}
        fields |= {"strict": draw(st.booleans()), "exact": draw(st.booleans()), "arrival": draw(st.floats(-50, 0))}
        for kind in ("total", "ttft"):
            if draw(st.booleans()):
                fields[kind] = draw(st.floats(0.001, 60))
        if draw(st.booleans()):
            fields["ran"] = draw(st.integers(floor, fields["ceiling"]))
            fields["confidence"] = draw(st.floats(0, 1))
        requests.append(fields)
    return view_of(*requests, rungs=rungs, max_running=draw(st.integers(1, 8)))


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=60, deadline=None)
@given(views())
def test_every_policy_keeps_floors_and_refuses_only_who_may_be_refused(name: str, view: View) -> None:
    policy = make_policy(name, view.rungs)
    for moment in range(3):
        decision = policy.decide(replace(view, now=view.now + moment * 0.5))
        inside = (decision.place >= view.floor) & (decision.place <= view.ceiling)
        assert (inside | (decision.place == SITS_OUT)).all()
        assert not (decision.refuse & ~(view.strict & view.budgeted & (view.place == NEVER_RAN))).any()
        assert 1 <= decision.chunk_tokens <= view.step_tokens
        assert set(decision.reason.tolist()) <= set(map(int, Reason))
        if len(view):
            assert decision.refuse.any() or (decision.place >= 0).any(), "somebody runs, else nothing ever ends"


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_without_load_everybody_gets_the_best(name: str) -> None:
    decision = decide(name, view_of({"total": 60.0}, {"ttft": 30.0, "ran": FULL}, {}), 20)
    assert decision.place.tolist() == [FULL] * 3
    assert not decision.refuse.any()
    if name != "fixed":
        assert decision.reason.tolist() == [Reason.BEST] * 3


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_who_has_one_place_is_pinned(name: str) -> None:
    decision = decide(name, view_of({"floor": 1, "ceiling": 1, "total": 0.5}, {"total": 60.0}))
    assert decision.place[0] == 1
    assert decision.reason[0] == Reason.PINNED


@pytest.mark.parametrize("name", PREDICTING)
def test_what_nothing_helps_is_refused_or_comes_last(name: str) -> None:
    """An answer of 16 tokens takes 16 x 2 ms on the cheapest place."""
    lost = {"total": 0.01}
    assert decide(name, view_of({**lost, "strict": True}, {"total": 60.0})).refuse.tolist() == [True, False]
    kept = decide(name, view_of(lost, {"total": 60.0}))
    assert not kept.refuse.any()
    assert kept.place[0] == SITS_OUT
    assert kept.place[1] >= 0
    assert decide(name, view_of(lost)).place[0] >= 0, "nobody else wants the machine"
    started = decide(name, view_of({**lost, "strict": True, "ran": 2}))
    assert not started.refuse.any()


@pytest.mark.parametrize("name", PREDICTING)
def test_a_budget_spent_in_the_queue_is_refused_later(name: str) -> None:
    view = view_of({"total": 0.5, "strict": True, "num_prompt": 320, "place": NEVER_RAN}, {"ran": FULL, "total": 9.0})
    policy = make_policy(name, view.rungs)
    assert not policy.decide(view).refuse.any()
    assert policy.decide(replace(view, now=0.49)).refuse.tolist() == [True, False]


def test_long_requests_step_down_before_short_ones() -> None:
    """Ten of each; all at full depth would take about 10 x (400 + 40) x 6 x 0.1 ms = 2.6 s."""
    short = {"num_prompt": 24, "expected_left": 16, "total": 1.6}
    long = {"num_prompt": 384, "expected_left": 16, "total": 1.6}
    requests = [{**kind, "arrival": -1e-3 * i} for i in range(10) for kind in (short, long)]
    decision = decide("slack", view_of(*requests, cost=BOUND), 60)
    assert (decision.place[::2] == FULL).all()
    assert (decision.place[1::2] < FULL).all()
    assert decision.reason[1] == Reason.OTHERS
    assert not decision.refuse.any()


def test_a_machine_whose_steps_vary_is_sold_less() -> None:
    """Full depth for all, and for as many again who are expected, fits where steps take what they should; where one in ten
    takes half as long again it may not."""
    requests = [{"num_prompt": 112, "expected_left": 16, "total": 1.6, "arrival": -1e-3 * i} for i in range(10)]
    regular, irregular = (view_of(*requests, cost=replace(BOUND, spread=spread)) for spread in (1.0, 1.5))
    assert (decide("slack", regular, 60).place == FULL).all()
    decision = decide("slack", irregular, 60)
    assert (decision.place < FULL).any()
    assert not decision.refuse.any()


def test_the_reserve_is_for_budgets_and_not_for_quality() -> None:
    """Ten fit at full depth, but not into six tenths of the time; sixty fit at the floor, but not into six tenths either.
    (Beside somebody without a budget who waits, nobody is spared because the floor would do for all.)"""
    prompt = {"num_prompt": 112, "expected_left": 16}
    ten, sixty = ([{**prompt, "total": 1.6, "arrival": -1e-3 * i, "strict": True} for i in range(n)] for n in (10, 60))
    without, kept = (decide("slack", view_of(*ten, cost=BOUND), 60, reserve=reserve) for reserve in (0.0, 0.4))
    assert (without.place == FULL).all()
    assert (kept.place < FULL).any()
    assert not kept.refuse.any()
    waits = {**prompt, "arrival": -1.0}
    without, kept = (decide("slack", view_of(*sixty, waits, cost=BOUND), 6, reserve=reserve) for reserve in (0.0, 0.4))
    assert without.refuse.sum() == kept.refuse.sum() == 0


def test_a_tight_pace_lowers_all_rows_together_where_weights_decide() -> None:
    """7 ms a step at full depth, however many rows: 16 tokens in 90 ms need at most 4 layers, of every row."""
    decision = decide("slack", view_of({"ran": FULL, "total": 0.09}, {"ran": FULL, "total": 9.0}), 60)
    assert (decision.place <= 2).all()
    assert decision.reason.tolist() == [Reason.DEADLINE, Reason.OTHERS]


def test_a_lone_request_starts_where_it_can_be_in_time() -> None:
    """A price sees machine time, of which one request takes little: 16 tokens at 7 ms each in 100 ms began on the full
    model, went to the floor when it was too late, and missed. Three of six layers take 71 ms, four 89."""
    assert decide("slack", view_of({"total": 0.1})).place.tolist() == [1]
    assert decide("slack", view_of({"total": 0.01})).place.tolist() == [0]
    assert decide("slack", view_of({"total": 1.0})).place.tolist() == [FULL]


def test_rows_without_a_budget_pause_but_not_for_ever() -> None:
    view = view_of({"ran": FULL, "total": 0.09}, {"ran": FULL, "floor": FULL})
    policy = make_policy("slack", view.rungs, turn=8)
    repeated(policy, view, 60)
    runs = [int(policy.decide(view).place[1]) for _ in range(32)]
    assert runs.count(FULL) == 4
    assert runs.count(SITS_OUT) == 28


def test_a_back_end_that_cannot_leave_rows_out_gets_none_left_out() -> None:
    view = view_of(
        {"ran": FULL, "total": 0.09}, {"ran": FULL, "floor": FULL}, {"total": 0.01}, capabilities=frozenset()
    )
    assert (decide("slack", view, 60).place >= 0).all()


def test_a_budget_that_nobody_could_keep_makes_nothing_dearer() -> None:
    """The next request got half the model after one with 1 ms: the time that requests had was 1 ms on average, and the price
    rose to where a machine does no more in that time."""
    policy = make_policy("slack", DEPTHS)
    hopeless = {"total": 1e-3, "expected_left": 60}
    policy.decide(view_of(hopeless))
    for token in range(40):
        policy.decide(view_of({**hopeless, "ran": 0, "expected_left": 60 - token}, now=0.1 + token * 0.01))
    assert policy.decide(view_of({"arrival": 0.6, "total": 3600.0}, now=0.6)).place.tolist() == [FULL]


def test_decisions_for_a_predicted_end_do_not_forget_who_came() -> None:
    """What is decided beside a step is for its predicted end, and the next decision may be for a moment before that. Each of
    these was taken for a clock that was set back: the rate of arrivals was forgotten, and no price rose."""
    chosen = []
    for beside in (0.0, 0.15):
        policy = make_policy("slack", DEPTHS)
        for number in range(60):
            now = 0.1 * number
            newest = {"num_prompt": 200, "total": 2.0, "arrival": now}
            before = {**newest, "ran": 1, "arrival": now - 0.1}
            policy.decide(view_of(before, newest, cost=BOUND, now=now))
            policy.decide(view_of({**newest, "ran": 1}, cost=BOUND, now=now + beside))
        chosen.append(int(policy.decide(view_of(newest, cost=BOUND, now=now)).place[0]))
    assert chosen[0] < FULL, "ten a second of 0.13 s each are too many at full depth"
    assert chosen[1] == chosen[0]


def test_after_a_pause_the_price_is_not_that_of_the_load_before() -> None:
    """It fell by the number of decisions, of which there are none while nobody asks."""
    busy = [{"num_prompt": 384, "total": 2.5, "arrival": -1e-3 * i, "expected_left": 200} for i in range(40)]
    policy = make_policy("slack", DEPTHS)
    assert (repeated(policy, view_of(*busy, cost=BOUND), 60).place < FULL).all()
    for now, expected in ((0.1, [True]), (60.0, [False])):
        new = view_of({"arrival": now, "total": 2.5, "num_prompt": 384, "expected_left": 200}, cost=BOUND, now=now)
        assert (policy.decide(new).place < FULL).tolist() == expected


def test_a_promotion_must_pay_back_its_refill() -> None:
    """Its refill takes 320 x 2 rows x layers, which others need more."""
    busy = [{"num_prompt": 384, "total": 2.5, "arrival": -1e-3 * i} for i in range(12)]
    fields = {"ran": 2, "num_prompt": 320, "total": 60.0, "expected_left": 4}
    assert decide("slack", view_of(fields, *busy, cost=BOUND), 60).place[0] == 2
    assert decide("slack", view_of(fields, cost=BOUND), 20).place[0] == FULL


def test_no_way_up_soon_after_a_change() -> None:
    fields = {"ran": 1, "total": 60.0, "expected_left": 100}
    assert decide("slack", view_of({**fields, "tokens_since_switch": 3}), 9).place[0] == 1
    assert decide("slack", view_of({**fields, "tokens_since_switch": 8}), 9).place[0] == FULL


@pytest.mark.parametrize("budgeted", [True, False])
def test_who_waited_too_long_gets_a_share_of_the_steps(budgeted: bool) -> None:
    """One without a budget, or one that will miss anyway, beside prompts that are never done."""
    waiting = {"total": 1.0} if budgeted else {"floor": FULL}
    others = [{"num_prompt": 100, "total": 50.0, "arrival": -0.1} for _ in range(3)]
    for waited, turns in ((PATIENCE_SECONDS - 1, 0), (PATIENCE_SECONDS + 1, 4), (PATIENCE_SECONDS * 2 + 1, 8)):
        policy = make_policy("slack", DEPTHS)
        alone = 0
        for _ in range(4 * SHARE_STEPS):
            place = policy.decide(view_of({**waiting, "arrival": -waited}, *others)).place
            alone += bool(place[0] >= 0 and (place[1:] == SITS_OUT).all())
        assert alone == turns


def test_admission_only_never_changes_what_runs() -> None:
    view = view_of({"ran": 2, "total": 0.01}, {"ran": FULL, "total": 60.0})
    assert decide("admission-only", view, 9).place.tolist() == [2, FULL]


def test_global_cap_falls_at_once_and_rises_a_place_at_a_time() -> None:
    policy = make_policy("global-cap", DEPTHS, hold=4)
    tight, free = view_of({"ran": FULL, "total": 0.05}), view_of({"ran": FULL, "total": 60.0})
    assert policy.decide(tight).place[0] == 0
    assert [int(policy.decide(free).place[0]) for _ in range(12)] == [0] * 3 + [1] * 4 + [2] * 4 + [3]


def test_slackfit_takes_the_most_accurate_that_the_most_urgent_can_bear() -> None:
    places = [
        int(decide("slackfit", view_of({"ran": FULL, "total": t}, {"total": 99.0})).place[0]) for t in (9, 0.095, 0.04)
    ]
    assert places[0] == FULL
    assert sorted(places, reverse=True) == places
    assert places[-1] == 0


@pytest.mark.parametrize("signal", ["maximum", "q-exit"])
def test_confidence_runs_deeper_the_less_sure_it_is(signal: str) -> None:
    sure = (float("nan"), 0.1, 0.8, 0.9, 0.95, 1.0)
    view = view_of(*({"ran": FULL, "total": 60.0, "confidence": value} for value in sure))
    place = decide("confidence", view, signal=signal).place.tolist()
    assert place[0] == FULL
    assert place == sorted(place, reverse=True)
    assert place[1] == FULL
    assert place[-1] == 0


def test_whom_nothing_helps_keeps_no_seat_from_others() -> None:
    """Served last, it sits out, but keeps its seat: enough of them held all seats for ever, and nobody else could start. A
    few of many seats are no loss: to end them costs time that others need."""
    lost, waits = {"ran": 0, "total": 0.001, "strict": True}, {"total": 60.0}
    free, taken = (decide("slack", view_of(lost, waits, max_running=seats)).place[0] for seats in (2, 1))
    assert free == SITS_OUT
    assert taken >= 0
    many = view_of(lost, *[{"ran": 0, "total": 60.0}] * 7, waits, max_running=8)
    assert decide("slack", many).place[0] == SITS_OUT


def test_names_and_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"no policy 'best'; there are: fixed, reject-only, .*slack"):
        make_policy("best", DEPTHS)
    with pytest.raises(ValueError, match=r"'slack'.*speed"):
        make_policy("slack", DEPTHS, speed=2)
    with pytest.raises(ValueError, match="threshold is 1"):
        make_policy("confidence", DEPTHS, threshold=1)
    with pytest.raises(ValueError, match="no signal 'none'; there are: maximum, q-exit"):
        make_policy("confidence", DEPTHS, signal="none")
    assert make_policy("fixed", DEPTHS, place=1).decide(view_of({})).place[0] == 1
