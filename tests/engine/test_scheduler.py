"""The scheduler on a runner without torch: one terminal event each, floors, memory, budgets and bookkeeping."""

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.admission import Limits
from sortserve.engine.budget import Budget
from sortserve.engine.cost import StepShape
from sortserve.engine.errors import (
    BudgetInfeasibleError,
    ContextLengthError,
    NotFoundError,
    OverloadedError,
    RequestError,
    SortServeError,
)
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Ladder
from sortserve.engine.plan import Plan, StepResult
from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.protocol import Decision, Policy, Reason, View
from sortserve.engine.policies.registry import POLICY_NAMES, make_policy
from sortserve.engine.protocol import (
    AcceptedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    PromptLogprobsEvent,
    RequestSummary,
    TokenEvent,
)
from sortserve.engine.reclaim import Reclaimer, Room
from sortserve.engine.request import Request
from sortserve.engine.rungs import Rungs
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.scheduler import Scheduler
from sortserve.engine.settings import SettingsTable
from tests.engine.small import (
    GEOMETRY,
    LADDER,
    SHAPE,
    FakeRunner,
    RefusesStrict,
    WantedPolicy,
    canned_token,
    step_cost,
    step_seconds,
)

CONTEXT = 24
ONE_SEQUENCE = GEOMETRY.pages_for(CONTEXT)
FULL = LADDER.full
HOUR = Budget(total_ms=3_600_000.0)


class Drive:
    """A scheduler, a fake runner and a clock of the test's own. Every step is checked, and every event kept."""

    def __init__(
        self,
        *,
        num_pages: int = 1000,
        policy: Policy | None = None,
        max_step_tokens: int = 8,
        max_running: int = 8,
        max_waiting: int = 100,
        eos: tuple[int, ...] = (),
        ladder: Ladder = LADDER,
        timed: bool = False,
        ask_every: int = 1,
        beside: bool = False,
        ahead: bool = False,
    ) -> None:
        self.ladder = ladder
        self.kv = KVManager(GEOMETRY, num_pages)
        self.policy = policy or WantedPolicy()
        self.scheduler = Scheduler(
            ladder,
            self.kv,
            self.policy,
            Limits(CONTEXT, SHAPE.vocab_size, max_waiting),
            eos_token_ids=eos,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            ask_every=ask_every,
        )
        if isinstance(self.policy, WantedPolicy):
            self.policy.requests = self.scheduler.requests
        if timed:
            self.scheduler.cost = step_cost(ladder)
        self.max_cost = max_step_tokens * SHAPE.num_layers
        self.max_running = max_running
        self.beside = beside  # whether bookkeeping is done while the runner works, else after
        self.ahead = ahead  # whether the next step is planned and run before this one's result is taken
        self.flight: tuple[Plan, StepResult] | None = None  # what was
        self.seen: Counter[str] = Counter()
        self.runner = FakeRunner()
        self.now = 100.0
        self.steps = 0
        self.events: dict[str, list[Event]] = {}
        self.asked: dict[str, GenerateRequest] = {}

    def submit(
        self,
        prompt: int | list[int] = 5,
        max_tokens: int = 4,
        *,
        budget: Budget | None = HOUR,
        sampling: dict[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        request_id = f"r{len(self.asked)}"
        tokens = tuple(prompt) if isinstance(prompt, list) else tuple(range(prompt))
        params = SamplingParams(max_tokens=max_tokens, **({"ignore_eos": True} | (sampling or {})))
        asked = GenerateRequest(request_id, tokens, params, self.now, budget, **fields)
        self.scheduler.add(asked)
        self.asked[request_id] = asked
        self.events[request_id] = []
        return request_id

    def request(self, request_id: str) -> Request:
        return self.scheduler.requests[request_id]

    def take(self, events: list[Event]) -> None:
        for event in events:
            told = self.events[event.request_id]
            assert not any(isinstance(before, FinishedEvent | FailedEvent) for before in told), "after the terminal one"
            told.append(event)

    def check_plan(self, plan: Plan) -> None:
        cost = 0
        bounds = GEOMETRY.bounds
        for part in plan.sequences:
            request = self.request(part.request_id)
            assert request.floor <= part.submodel <= request.ceiling, "a floor was broken"
            assert part.exit == self.scheduler.settings.exits[part.submodel]
            cost += sum(span.num_rows * (bounds[span.exit] - bounds[span.first_segment]) for span in part.spans)
        assert cost <= self.max_cost, "the step's rows x layers are over its budget"
        assert sum(request.running for request in self.scheduler.requests.values()) <= self.max_running

    def step(self, between: Callable[[], None] = lambda: None) -> Plan | None:
        """One step; `between` is what happens while the runner works."""
        flight, self.flight = self.flight, None
        flight = flight or self.launch(self.scheduler.schedule(self.now))
        if flight is None:
            self.take(self.scheduler.take_events())
            return None
        plan, result = flight
        self.steps += 1
        if self.beside or self.ahead:
            self.scheduler.beside(plan, self.now)
            self.scheduler.check_integrity()
        cost = self.scheduler.cost
        if cost is not None:
            self.now += float(cost.seconds(self.shape(plan)))
        if self.ahead:
            self.flight = self.launch(self.scheduler.ahead(plan, self.now))
            self.seen["planned ahead"] += self.flight is not None
        between()
        self.seen["surplus row"] += sum(part.request_id not in self.scheduler.requests for part in plan.sequences)
        self.take(self.scheduler.update(plan, result, self.now))
        self.scheduler.check_integrity()
        return plan

    def launch(self, plan: Plan | None) -> tuple[Plan, StepResult] | None:
        self.scheduler.check_integrity()
        if plan is None:
            return None
        self.check_plan(plan)
        return plan, self.runner.run(plan, self.scheduler.requests)

    def shape(self, plan: Plan) -> StepShape:
        return shape_of_parts(self.scheduler.rungs, plan.sequences)

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id, self.now)
        if event is not None:
            self.take([event])
        self.scheduler.check_integrity()

    def run(self, limit: int = 3000) -> None:
        """To the end of everything that was accepted; each must have ended exactly once, with what it was promised."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "a request hangs"
        for request_id in self.asked:
            self.check_ended(request_id)
        pool = self.kv.pool
        assert self.kv.prefix.idle_pages + pool.num_free == pool.num_pages, "a page is still in use"

    def summary(self, request_id: str) -> RequestSummary:
        (end,) = [event for event in self.events[request_id] if isinstance(event, FinishedEvent)]
        return end.summary

    def tokens(self, request_id: str) -> list[int]:
        return [event.token for event in self.events[request_id] if isinstance(event, TokenEvent)]

    def reason(self, request_id: str) -> str:
        end = self.events[request_id][-1]
        assert isinstance(end, FinishedEvent)
        return end.reason

    def check_ended(self, request_id: str) -> None:
        asked, events = self.asked[request_id], self.events[request_id]
        if isinstance(events[-1], FailedEvent):
            assert len(events) == 1
            assert events[-1].error == "OverloadedError"
            assert asked.budget is not None
            assert asked.budget.policy == "strict"
            return
        ends = [event for event in events if isinstance(event, FinishedEvent)]
        assert len(ends) == 1, (request_id, events)
        assert events[-1] is ends[0]
        tokens = self.tokens(request_id)
        assert tokens == [canned_token(len(asked.prompt) + number) for number in range(len(tokens))]
        assert sum(ends[0].summary.submodels.values()) == len(tokens)
        if ends[0].reason != "abort":
            assert isinstance(events[0], AcceptedEvent)
        assert sum(isinstance(event, AcceptedEvent) for event in events) <= 1
        if ends[0].reason == "length" and not ends[0].summary.cut:
            assert len(tokens) == asked.sampling.max_tokens


# ---- every request ends once


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32).map(random.Random))
def test_every_request_ends_exactly_once(rng: random.Random) -> None:
    random_schedule(rng)


def test_short_of_memory_nobody_falls_back_on_a_deeper_place() -> None:
    """Of d3 and the cheaper but deeper d4-w50, the floor: short of pages, the request tried the latter, found no room in the
    step for the rows it lacked there, and asked nobody for memory. Two that ran then waited for each other for ever."""
    random_schedule(random.Random(1108))


@pytest.mark.parametrize("beside", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32).map(random.Random))
def test_every_request_ends_where_decisions_are_repeated(beside: bool, rng: random.Random) -> None:
    """What is booked and laid out beside a running step is as good as what is planned after it."""
    random_schedule(rng, ask_every=4, beside=beside)


def random_schedule(rng: random.Random, ask_every: int = 1, beside: bool = False, ahead: bool = False) -> Drive:
    """Random submits, aborts (also while the runner works), switches and ends, down to pools that hold one sequence."""
    policy = WantedPolicy()
    drive = Drive(
        num_pages=rng.choice([ONE_SEQUENCE, ONE_SEQUENCE + 6, 3 * ONE_SEQUENCE]),
        policy=policy,
        max_step_tokens=rng.choice([1, 3, 8, 50]),
        max_running=rng.choice([1, 2, 8]),
        max_waiting=6,
        eos=(canned_token(9), canned_token(13)),
        ask_every=ask_every,
        beside=beside,
        ahead=ahead,
    )

    def abort_one() -> None:
        if drive.scheduler.requests and rng.random() < 0.1:
            drive.abort(rng.choice(list(drive.scheduler.requests)))

    for _ in range(rng.randrange(20, 60)):
        action = rng.choice(["submit", "step", "step", "step", "switch", "abort"])
        if action == "submit":
            start = rng.choice([0, 0, 0, 50])
            length = rng.randrange(1, 16)
            sampling: dict[str, Any] = {"ignore_eos": rng.random() < 0.5}
            fields: dict[str, Any] = {"budget": rng.choice([None, HOUR, Budget(tpot_ms=20)])}
            if rng.random() < 0.2:
                fields["submodel"] = rng.choice(LADDER.entries).id
            else:
                fields |= {"floor": rng.choice([None, rng.choice(LADDER.entries).id])}
                fields |= {"kv_mode": rng.choice([None, "exact", "reuse"])}
            if rng.random() < 0.2:
                sampling["prompt_logprobs"] = 0
            try:
                drive.submit(
                    list(range(start, start + length)),
                    rng.randrange(1, CONTEXT - length + 1),
                    sampling=sampling,
                    **fields,
                )
            except OverloadedError:
                assert len(drive.scheduler.requests) >= 6
        elif action == "step":
            drive.step(abort_one)
        elif action == "switch" and drive.scheduler.requests:
            policy.wanted[rng.choice(list(drive.scheduler.requests))] = rng.choice([None, *range(FULL + 1)])
        elif action == "abort":
            abort_one()
    policy.wanted = {name: FULL if place is None else place for name, place in policy.wanted.items()}
    drive.run()
    return drive


@pytest.mark.parametrize("place", [0, 3, FULL])
def test_all_finish_in_the_smallest_pool(place: int) -> None:
    """The pool holds one sequence of the context length at full depth, and five want it at once."""
    policy = WantedPolicy(place)
    drive = Drive(num_pages=ONE_SEQUENCE, policy=policy)
    ids = [drive.submit(list(range(i, i + 12)), 12, budget=None if place == FULL else HOUR) for i in range(5)]
    drive.run()
    assert all(drive.reason(name) == "length" for name in ids)
    if place == FULL:
        assert drive.scheduler.stats().preemptions > 0
        assert drive.scheduler.stats().preemptions == sum(drive.summary(name).preemptions for name in ids)


def test_ends_are_told_apart() -> None:
    drive = Drive(eos=(canned_token(7),))
    by_eos = drive.submit(5, 10, sampling={"ignore_eos": False})
    ignoring = drive.submit(5, 10)
    by_stop = drive.submit(5, 10, sampling={"stop_token_ids": (canned_token(6),)})
    by_length = drive.submit(5, 2, sampling={"ignore_eos": False})
    drive.run()
    ends = {name: (drive.reason(name), len(drive.tokens(name))) for name in drive.asked}
    assert ends == {by_eos: ("stop", 3), ignoring: ("length", 10), by_stop: ("stop", 2), by_length: ("length", 2)}


# ---- abort


def test_abort_frees_its_pages_at_once() -> None:
    drive = Drive()
    name = drive.submit(11, 8)
    drive.step()
    drive.step()
    assert drive.kv.pool.num_free + drive.kv.prefix.idle_pages < 1000
    drive.abort(name)
    assert drive.kv.pool.num_free + drive.kv.prefix.idle_pages == 1000
    assert drive.reason(name) == "abort"
    assert drive.scheduler.abort(name, drive.now) is None
    drive.run()


def test_abort_while_the_runner_works() -> None:
    """The surplus row is thrown away, and nothing is told after the end."""
    drive = Drive()
    gone, stays = drive.submit(5, 4), drive.submit(5, 4)
    drive.step(lambda: drive.abort(gone))
    assert [type(event) for event in drive.events[gone]] == [FinishedEvent]
    drive.run()
    assert len(drive.tokens(stays)) == 4


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "error", "told", "param"),
    [
        ({"prompt": []}, RequestError, "empty", "prompt"),
        (
            {"prompt": 20, "max_tokens": 5},
            ContextLengthError,
            "20 prompt tokens and max_tokens 5 are 25.*24",
            "max_tokens",
        ),
        ({"prompt": [3, 100]}, RequestError, r"100 is not in \[0, 100\)", "prompt"),
        ({"prompt": [-1]}, RequestError, r"-1 is not in \[0, 100\)", "prompt"),
        ({"sampling": {"logit_bias": {100: 1.0}}}, RequestError, "100 is not in", "logit_bias"),
        ({"sampling": {"stop_token_ids": (-5,)}}, RequestError, "-5 is not in", "stop_token_ids"),
        ({"submodel": "d9"}, NotFoundError, "'d9'.*d1-w50", "submodel"),
        ({"floor": "d9"}, NotFoundError, "'d9'.*d1-w50", "submodel_floor"),
        ({"submodel": "d1", "floor": "d3"}, RequestError, "'d1' is below the floor 'd3'", "submodel_floor"),
        ({"quality_floor": 1.5}, RequestError, r"1.5, must be in \[0, 1\]", "quality_floor"),
        ({"quality_floor": float("nan")}, RequestError, r"nan, must be in \[0, 1\]", "quality_floor"),
    ],
)
def test_what_cannot_be_served_is_refused(
    fields: dict[str, Any], error: type[SortServeError], told: str, param: str
) -> None:
    drive = Drive()
    with pytest.raises(error, match=told) as raised:
        drive.submit(**fields)
    assert raised.value.param == param
    assert not drive.scheduler.has_work, "it leaves no trace"
    assert drive.scheduler.stats().prompt_tokens == 0


def test_the_context_may_be_filled() -> None:
    drive = Drive()
    name = drive.submit(20, 4)
    drive.run()
    assert len(drive.tokens(name)) == 4


def test_who_was_refused_and_left_takes_nobody_along() -> None:
    """Another request may have the id of one that was given up and aborted before it was told; it was ended instead."""
    drive = Drive(policy=RefusesStrict(LADDER.full), ask_every=8)
    scheduler = drive.scheduler
    first = drive.submit(2, 8)
    plan = scheduler.schedule(drive.now)
    assert plan is not None

    def asked(budget: Budget | None) -> GenerateRequest:
        return GenerateRequest("again", (1, 2), SamplingParams(max_tokens=4), drive.now, budget)

    scheduler.add(asked(Budget(total_ms=600_000.0, policy="strict")))
    scheduler.beside(plan, drive.now)  # asks the policy, which refuses it
    assert scheduler.abort("again", drive.now) is not None
    scheduler.add(asked(None))
    scheduler.schedule(drive.now)
    assert set(scheduler.requests) == {first, "again"}
    for request_id in (first, "again"):
        scheduler.abort(request_id, drive.now)
    scheduler.check_integrity()


def test_a_full_queue_refuses() -> None:
    drive = Drive(max_waiting=2)
    drive.submit()
    drive.submit()
    with pytest.raises(OverloadedError, match=r"2 requests are waiting, the queue holds 2") as raised:
        drive.submit()
    assert raised.value.retry_after > 0
    assert drive.scheduler.stats().dropped == {"queue_full": 1}
    drive.step()  # both run
    drive.submit()
    drive.run()


@pytest.mark.parametrize(
    ("fields", "floor", "ceiling", "mode"),
    [
        ({"budget": None}, "d6", "d6", "exact"),
        ({}, "d1-w50", "d6", "reuse"),
        ({"kv_mode": "exact"}, "d1-w50", "d6", "exact"),
        ({"submodel": "d3"}, "d3", "d3", "exact"),
        ({"submodel": "d3", "budget": None}, "d3", "d3", "exact"),
        ({"floor": "d4"}, "d4", "d6", "reuse"),
        ({"floor": "d4", "budget": None}, "d4", "d6", "exact"),
        ({"quality_floor": 0.6}, "d6-w50", "d6", "reuse"),
        ({"quality_floor": 0.6, "floor": "d3"}, "d6-w50", "d6", "reuse"),
    ],
)
def test_terms(fields: dict[str, Any], floor: str, ceiling: str, mode: str) -> None:
    """A floor that was asked for used to be dropped without a budget: such a request may be demoted for others."""
    drive = Drive()
    request = drive.request(drive.submit(**fields))
    ids = [entry.id for entry in LADDER.entries]
    assert (ids[request.floor], ids[request.ceiling], request.kv_mode) == (floor, ceiling, mode)


# ---- budgets


def test_a_strict_budget_that_an_idle_server_cannot_keep() -> None:
    drive = Drive(timed=True)
    fastest = 1e3 * step_seconds(0, 5)
    with pytest.raises(BudgetInfeasibleError, match=r"even idle.*about \d+ ms") as raised:
        drive.submit(5, budget=Budget(ttft_ms=fastest / 2, policy="strict"))
    told = int(raised.value.message.split()[-2])
    assert fastest <= told <= fastest + 1
    drive.submit(5, budget=Budget(ttft_ms=told, policy="strict"))
    assert drive.scheduler.stats().dropped == {"latency_budget_infeasible": 1}
    # best-effort takes it, late if need be
    late = drive.submit(5, budget=Budget(ttft_ms=fastest / 2))
    drive.run()
    assert drive.summary(late).met is False


@pytest.mark.parametrize("name", ["total_ms", "tpot_ms"])
def test_a_strict_refusal_names_the_constraint_that_cannot_be_kept(name: str) -> None:
    """It told the time to the first token, whatever was asked; with what it tells now the same request is accepted."""
    drive = Drive(timed=True)
    with pytest.raises(BudgetInfeasibleError, match="smallest feasible latency_budget_") as raised:
        drive.submit(5, 12, budget=Budget(ttft_ms=3_600_000, policy="strict", **{name: 0.001}))
    assert raised.value.param == ("latency_budget_ms" if name == "total_ms" else "latency_budget_tpot_ms")
    told = int(raised.value.message.split()[-2])
    drive.submit(5, 12, budget=Budget(policy="strict", **{name: told}))


def test_a_strict_budget_counts_max_tokens_only_where_they_are_certain() -> None:
    drive = Drive(timed=True)
    enough = 1e3 * (step_seconds(0, 5) + 2 * step_seconds(0, 1))
    drive.submit(5, 12, budget=Budget(total_ms=enough, policy="strict"), sampling={"ignore_eos": False})
    with pytest.raises(BudgetInfeasibleError):
        drive.submit(5, 12, budget=Budget(total_ms=enough, policy="strict"))


def test_a_strict_budget_that_the_load_forbids() -> None:
    drive = Drive(timed=True, max_step_tokens=32)
    strict = Budget(tpot_ms=1e3 * step_seconds(0, 3), policy="strict")
    drive.submit(2, 8, budget=strict)
    for _ in range(4):
        drive.submit(2, 8)
    drive.step()
    with pytest.raises(OverloadedError, match=r"5 running") as raised:
        drive.submit(2, 8, budget=strict)
    assert raised.value.retry_after > 0
    assert drive.scheduler.stats().dropped == {"overloaded": 1}
    drive.run()
    drive.submit(2, 8, budget=strict)


@pytest.mark.parametrize("others", [0, 5])
def test_cut_stops_in_time(others: int) -> None:
    """With others running it used to reckon with a step of its own on its floor, and came late."""
    drive = Drive(timed=True, max_step_tokens=32)
    for number in range(others):
        drive.submit([number], 20)
    drive.step()
    deadline = 0.1
    name = drive.submit(3, 20, budget=Budget(total_ms=1e3 * deadline, policy="cut"))
    arrival = drive.now
    drive.run()
    summary = drive.summary(name)
    times = [event.time for event in drive.events[name] if isinstance(event, TokenEvent)]
    assert summary.cut
    assert summary.met
    assert drive.reason(name) == "length"
    assert 0 < len(times) < 20
    assert times[-1] <= arrival + deadline
    whole_step = times[-1] - times[-2]
    assert times[-1] + whole_step > arrival + deadline - 1e-9, "one more token would have come too late"


def test_cut_before_the_first_row() -> None:
    drive = Drive(timed=True)
    name = drive.submit(5, 4, budget=Budget(total_ms=0.01, policy="cut"))
    assert drive.step() is None
    accepted, end = drive.events[name]
    assert isinstance(accepted, AcceptedEvent)
    assert not accepted.predicted_met
    assert isinstance(end, FinishedEvent)
    assert end.summary.cut
    assert end.summary.met is False
    drive.run()


def test_met_is_told_for_prompts_that_are_only_measured() -> None:
    drive = Drive(timed=True)
    kept = drive.submit(5, 0, sampling={"prompt_logprobs": 0})
    missed = drive.submit(5, 0, budget=Budget(total_ms=1.0), sampling={"prompt_logprobs": 0})
    drive.run()
    assert (drive.summary(kept).met, drive.summary(missed).met) == (True, False)


def test_what_is_predicted_comes_true() -> None:
    drive = Drive(timed=True)
    name = drive.submit(5, 6)
    drive.run()
    accepted = drive.events[name][0]
    assert isinstance(accepted, AcceptedEvent)
    summary = drive.summary(name)
    assert accepted.predicted_seconds == pytest.approx(summary.total_seconds, rel=1e-6)
    assert summary.first_token_seconds == pytest.approx(step_seconds(FULL, 5), rel=1e-6)
    assert summary.queue_seconds == 0.0


# ---- policies


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_serves_a_burst(name: str) -> None:
    """Three times more than the machine can do, of all kinds of requests: each ends once, floors hold (`check_plan`), only
    strict ones are refused, every change of sub-model has its reason, and pages come back."""
    rng = random.Random(name)
    policy = make_policy(name, Rungs.of(LADDER, SettingsTable(LADDER)))
    drive = Drive(policy=policy, timed=True, max_step_tokens=16, ask_every=4, num_pages=6 * ONE_SEQUENCE)
    for _ in range(60):
        budget = rng.choice(
            [
                None,
                Budget(total_ms=rng.uniform(50, 2000), policy=rng.choice(["best-effort", "strict", "cut"])),
                Budget(ttft_ms=rng.uniform(10, 500), tpot_ms=rng.uniform(5, 60)),
            ]
        )
        fields: dict[str, Any] = rng.choice([{}, {"floor": rng.choice(LADDER.entries).id}, {"kv_mode": "exact"}])
        with contextlib.suppress(BudgetInfeasibleError, OverloadedError):
            drive.submit([rng.randrange(90) for _ in range(rng.randrange(1, 12))], 12, budget=budget, **fields)
        for _ in range(rng.randrange(3)):
            drive.step()
    drive.run(limit=20_000)
    stats = drive.scheduler.stats()
    ended = [events[-1] for events in drive.events.values()]
    summaries = [event.summary for event in ended if isinstance(event, FinishedEvent)]
    started = sum(any(isinstance(event, TokenEvent) for event in events) for events in drive.events.values())
    changes = sum(summary.switches for summary in summaries)
    assert started + changes <= sum(stats.selected.values()) <= len(summaries) + changes, "a change without a reason"
    assert {reason for _, reason in stats.selected} <= {reason.name.lower() for reason in Reason}
    assert stats.switches.get("up", 0) + stats.switches.get("down", 0) == changes


def test_a_policy_that_breaks_a_floor_is_caught() -> None:
    class Careless(FixedPolicy):
        def decide(self, view: View) -> Decision:
            decision = super().decide(view)
            return Decision(np.zeros_like(decision.place), decision.reason, decision.refuse, decision.chunk_tokens)

    drive = Drive(policy=Careless(FULL))
    drive.submit(floor="d3")
    with pytest.raises(AssertionError, match="broke a floor"):
        drive.step()


def test_a_refusal_while_it_waits() -> None:
    """A strict request that the policy gives up is told so once, with when to come back, and leaves no trace."""

    class Refusing(FixedPolicy):
        def decide(self, view: View) -> Decision:
            decision = super().decide(view)
            return Decision(decision.place, decision.reason, view.strict & (view.place < 0), decision.chunk_tokens)

    drive = Drive(policy=Refusing(FULL))
    strict = drive.submit(budget=Budget(total_ms=10_000, policy="strict"))
    other = drive.submit()
    drive.step()
    [event] = drive.events[strict]
    assert isinstance(event, FailedEvent)
    assert (event.error, event.retry_after) == ("OverloadedError", 1.0)
    drive.run()
    assert len(drive.tokens(other)) == 4
    assert drive.scheduler.stats().dropped == {"overloaded": 1}


@pytest.mark.parametrize("beside", [False, True])
def test_repeating_a_decision_gives_what_asking_every_step_gives(beside: bool) -> None:
    """`fixed` always answers alike: then the same rows run in every step, whether it is asked or not."""

    def plans(ask_every: int) -> list[list[tuple[str, int, int, int]]]:
        rng = random.Random(5)
        drive = Drive(policy=FixedPolicy(3), max_running=4, ask_every=ask_every, beside=beside and ask_every > 1)
        seen = []
        for number in range(30):
            drive.submit([number % 7] * rng.randrange(1, 9), rng.randrange(1, 9), budget=rng.choice([None, HOUR]))
            for _ in range(rng.randrange(4)):
                plan = drive.step()
                seen.append(
                    [] if plan is None else [(p.request_id, p.submodel, p.start, p.stop) for p in plan.sequences]
                )
        drive.run()
        return seen

    assert plans(ask_every=8) == plans(ask_every=1)


# ---- steps


@pytest.mark.parametrize("max_step_tokens", [1, 3, 5, 30])
def test_chunks_are_bounded_in_rows_times_layers(max_step_tokens: int) -> None:
    """`check_plan` has the bound; a shallow prompt gets more rows for the same layers."""
    drive = Drive(max_step_tokens=max_step_tokens)
    drive.submit(20, 2)
    plan = drive.step()
    assert plan is not None
    assert plan.num_rows == min(20, max_step_tokens)
    drive.run()
    drive.submit([50, *range(19)], 2, submodel="d3")
    plan = drive.step()
    assert plan is not None
    assert plan.num_rows == min(20, 2 * max_step_tokens)
    drive.run()


def test_rows_of_one_token_go_before_prompts() -> None:
    drive = Drive(max_step_tokens=4)
    decoding = [drive.submit([number], 8) for number in range(3)]
    drive.step()
    drive.submit(list(range(30, 50)), 2)
    for _ in range(3):
        plan = drive.step()
        assert plan is not None
        rows = {part.request_id: part.stop - part.start for part in plan.sequences}
        assert [rows[name] for name in decoding] == [1, 1, 1]
        assert sum(rows.values()) == 4
    drive.run()


def test_earliest_deadline_first() -> None:
    drive = Drive(max_step_tokens=4)
    drive.submit([1, 2, 3, 4], 2, budget=Budget(ttft_ms=900))
    urgent = drive.submit([5, 6, 7, 8], 2, budget=Budget(ttft_ms=100))
    plan = drive.step()
    assert plan is not None
    assert [part.request_id for part in plan.sequences] == [urgent]
    drive.run()


def test_a_refill_counts_and_keeps_what_was_computed() -> None:
    policy = WantedPolicy(LADDER.place("d1"))
    drive = Drive(policy=policy, max_step_tokens=50)
    name = drive.submit(6, 8)
    drive.step()
    drive.step()
    policy.default = LADDER.place("d4")
    plan = drive.step()
    assert plan is not None
    (part,) = plan.sequences
    assert [(span.start, span.stop, span.first_segment) for span in part.spans] == [(0, 7, 1), (7, 8, 0)]
    policy.default = LADDER.place("d1")
    drive.run()
    summary = drive.summary(name)
    assert summary.refilled_tokens == drive.scheduler.stats().refilled_tokens == 7
    assert summary.switches == 2
    assert summary.submodels == {"d1": 7, "d4": 1}
    assert drive.scheduler.stats().switches == {"up": 1, "down": 1}


# ---- memory


class Memory:
    """Requests set up by hand, the last two victims of the first one; what make_room takes is seen step by step."""

    def __init__(self) -> None:
        self.policy = WantedPolicy()
        self.drive = Drive(policy=self.policy, max_step_tokens=100)
        self.kv = self.drive.kv
        cached = self.drive.submit(list(range(60, 69)), 1)
        self.drive.run()
        assert self.drive.reason(cached) == "length"
        self.shallow = self.drive.submit(list(range(20, 28)), 8)  # keeps exit states
        self.deep = self.drive.submit(list(range(40, 48)), 8)  # may be demoted
        self.policy.wanted[self.shallow] = LADDER.place("d3")
        self.drive.step()
        self.asking = self.drive.request(self.drive.submit(list(range(80, 84)), 1, submodel="d1"))
        self.reclaimer = Reclaimer(self.kv, self.drive.scheduler.settings)

    def levels(self) -> tuple[bool, bool, bool, bool]:
        """What is there still: cached prefixes, exit states, deep pages, and requests that run."""
        shallow, deep = self.drive.request(self.shallow), self.drive.request(self.deep)
        deepest = any(deep.kv.cells[1:]) or any(shallow.kv.cells[1:])
        return self.kv.prefix.idle_pages > 0, bool(shallow.kv.states), deepest, shallow.running or deep.running

    def make_room(self) -> Room | None:
        victims = [self.drive.request(self.shallow), self.drive.request(self.deep)]
        return self.reclaimer.make_room(self.asking, 1, 4, states=False, victims=victims)


def test_memory_is_taken_back_in_order() -> None:
    """Cached prefixes, then exit states, then deep pages, then whole requests: nothing goes while an earlier kind is left.
    Blocks that a release leaves to the cache are evicted before the next thing is taken from anyone."""
    memory = Memory()
    seen = [memory.levels()]
    assert seen == [(True, True, True, True)]
    while memory.make_room() is not None:
        pages = memory.kv.pool.allocate(memory.kv.pool.num_free)
        assert pages is not None
        if memory.levels() != seen[-1]:
            seen.append(memory.levels())
    first_gone = [next((i for i, state in enumerate(seen) if not state[kind]), len(seen)) for kind in (1, 2, 3)]
    assert first_gone == sorted(first_gone)
    assert len(set(first_gone)) == 3, f"each kind by itself: {seen}"
    for (_, states, deep, running), after in itertools.pairwise(seen):
        if not after[1] and states:
            assert deep, "deep pages went before states"
            assert running
    assert seen[-1] == (False, False, False, False)
    events = memory.kv.events
    assert events["evicted"] > 0
    assert events["release"] > 0
    assert (events["states_dropped"], events["preempted"]) == (1, 2)


def test_pinned_and_full_requests_are_not_released() -> None:
    """Deep pages go only where the floor allows it; the rest is preempted whole."""
    drive = Drive(max_step_tokens=100)
    pinned = drive.submit(8, 8, submodel="d6")
    drive.step()
    asking = drive.request(drive.submit([90], 1))
    drive.kv.pool.allocate(drive.kv.pool.num_free)
    reclaimer = Reclaimer(drive.kv, drive.scheduler.settings)
    victim = drive.request(pinned)
    assert reclaimer.make_room(asking, 4, 1, states=False, victims=[]) is None
    assert victim.running, "an empty list spares everybody"
    assert reclaimer.make_room(asking, 4, 1, states=False, victims=[victim]) == Room(False)
    assert drive.kv.events["release"] == 0
    assert not victim.running
    assert victim.preemptions == 1


def test_memory_short_runs_on_the_floor_before_it_preempts() -> None:
    """A request that may be demoted takes its own pages on its floor rather than somebody else's."""
    drive = Drive(num_pages=ONE_SEQUENCE + 4, max_step_tokens=100)
    big = drive.submit(23, 1, submodel="d6", budget=Budget(total_ms=1000))
    small = drive.submit([90, 91], 1)
    drive.run()
    assert drive.summary(big).submodels == {"d6": 1}
    assert drive.summary(small).submodels == {"d1-w50": 1}
    assert drive.scheduler.stats().selected["d1-w50", "memory"] == 1
    assert drive.scheduler.stats().preemptions == 0


def test_exact_kv_short_of_memory_does_not_change_widths_to_and_fro() -> None:
    """A policy that asks for full width and a memory that only had room for the floor's: each step dropped what the step
    before had computed, for ever. Found by this very schedule, one of 500 random ones."""
    random_schedule(random.Random(304))


# ---- prompt log-probabilities


def prompt_logprobs_of(drive: Drive, name: str) -> list[float | None]:
    (event,) = [event for event in drive.events[name] if isinstance(event, PromptLogprobsEvent)]
    assert [None if entry is None else entry.token for entry in event.logprobs] == [None, *drive.asked[name].prompt[1:]]
    return [None if entry is None else entry.logprob for entry in event.logprobs]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 9, 20])
@pytest.mark.parametrize("max_step_tokens", [1, 4, 100])
def test_prompt_logprobs_come_once_and_whole(max_tokens: int, length: int, max_step_tokens: int) -> None:
    """A prompt of one token got none at all unless `max_tokens` was 0."""
    drive = Drive(max_step_tokens=max_step_tokens)
    drive.submit(length, 1)
    drive.run()  # in the prefix cache now, which such a request does not read
    name = drive.submit(length, max_tokens, sampling={"prompt_logprobs": 2})
    drive.run()
    assert prompt_logprobs_of(drive, name) == [None, *(-float(position) for position in range(1, length))]
    assert drive.summary(name).cached_tokens == 0
    kinds = [type(event) for event in drive.events[name]]
    assert kinds == [AcceptedEvent, PromptLogprobsEvent, *[TokenEvent] * max_tokens, FinishedEvent]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32).map(random.Random), st.integers(1, 18), st.integers(0, 4))
def test_prompt_logprobs_across_chunks_preemption_and_switches(
    rng: random.Random, length: int, max_tokens: int
) -> None:
    policy = WantedPolicy()
    drive = Drive(policy=policy, max_step_tokens=rng.choice([1, 3, 7]))
    name = drive.submit(length, max_tokens, sampling={"prompt_logprobs": 0})
    for _ in range(40):
        if name not in drive.scheduler.requests:
            break
        if rng.random() < 0.2 and drive.request(name).running:
            drive.scheduler._planner.reclaimer._preempt(drive.request(name))
        policy.wanted[name] = rng.randrange(FULL + 1)
        drive.step()
    drive.run()
    assert prompt_logprobs_of(drive, name) == [None, *(-float(position) for position in range(1, length))]


# ---- counters


def test_stats() -> None:
    drive = Drive()
    prompt = list(range(9))
    drive.submit(prompt, 3)
    drive.run()
    second = drive.submit(prompt, 2, submodel="d3")
    third = drive.submit([70, 71], 2, submodel="d3-w50")
    waiting = drive.scheduler.stats()
    assert (waiting.running, waiting.waiting) == (0, 2)
    drive.step()
    running = drive.scheduler.stats()
    assert (running.running, running.waiting) == (2, 0)
    assert running.kv_pages_used + running.kv_pages_cached + drive.kv.pool.num_free == running.kv_pages_total == 1000
    assert running.kv_pages_used > 0
    drive.run()
    stats = drive.scheduler.stats()
    assert stats.prompt_tokens == 9 + 9 + 2
    assert stats.generated_tokens == {"d6": 3, "d3": 2, "d3-w50": 2}
    assert stats.selected == {("d6", "fixed"): 1, ("d3", "fixed"): 1, ("d3-w50", "fixed"): 1}
    assert (stats.prefix_queries, stats.prefix_hits) == (9 + 9 + 2, 8)
    assert (drive.summary(second).cached_tokens, drive.summary(third).cached_tokens) == (8, 0)
    assert (stats.kv_pages_used, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.steps == drive.steps == 4 + 2


def test_a_prefix_is_counted_once_however_long_it_waits() -> None:
    """Each attempt of a request that waited for memory used to be one more query."""
    drive = Drive(num_pages=ONE_SEQUENCE, max_step_tokens=100)
    drive.submit(20, 4, budget=None)
    drive.step()
    drive.submit(12, 4, budget=None)
    drive.run()
    assert drive.scheduler.stats().prefix_queries == 20 + 12


def test_blocks_under_other_widths_are_counted() -> None:
    drive = Drive()
    drive.submit(9, 1)
    drive.run()
    drive.submit(9, 1, submodel="d6-w50")
    drive.run()
    assert drive.scheduler.stats().prefix_refused_width > 0
    assert drive.scheduler.stats().prefix_hits == 0


def test_max_running_holds_the_rest_back() -> None:
    drive = Drive(max_running=2, policy=FixedPolicy(FULL))
    names = [drive.submit([number], 3) for number in range(5)]
    seen: Counter[int] = Counter()
    while drive.scheduler.has_work:
        drive.step()
        seen[drive.scheduler.stats().running] += 1
    assert max(seen) == 2
    assert all(drive.reason(name) == "length" for name in names)
