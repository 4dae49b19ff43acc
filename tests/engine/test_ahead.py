"""Steps planned and run before the result of the one before is taken."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine import ahead
from sortserve.engine.budget import Budget
from sortserve.engine.engine import Engine
from sortserve.engine.plan import PENDING, Plan, StepResult
from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.protocol import FinishedEvent, TokenEvent
from sortserve.engine.scheduler import Scheduler
from sortserve.engine.stepping import Stepper
from tests.engine.asif import Harness, random_run
from tests.engine.drive import Outcome, ask, greedy, load_engine, run
from tests.engine.launching import LateTokens
from tests.engine.small import LADDER, WantedPolicy, canned_token
from tests.engine.test_scheduler import FULL, HOUR, ONE_SEQUENCE, Drive, random_schedule
from tests.engine.tiny_models import make_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_request_ends_exactly_once() -> None:
    """Random schedules as in test_scheduler.py, aborts while two steps are under way among them. What must come up comes up
    in more than half of the schedules."""
    seen: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32).map(random.Random), st.sampled_from([1, 4]))
    def check(rng: random.Random, ask_every: int) -> None:
        drive = random_schedule(rng, ask_every=ask_every, ahead=True)
        seen.update(drive.seen)
        seen["preempted"] += drive.kv.events["preempted"]

    check()
    assert all(seen[what] > 0 for what in ("planned ahead", "surplus row", "preempted")), seen


# ---- the same steps as one after the other


def plans(ahead: bool, seed: int, **fields: Any) -> tuple[list[object], dict[str, list[int]]]:
    """All steps of some requests that are there from the start, and their tokens."""
    rng = random.Random(seed)
    policy = WantedPolicy() if rng.random() < 0.5 else FixedPolicy(3)
    drive = Drive(policy=policy, ahead=ahead, **fields)
    for number in range(12):
        name = drive.submit(
            [number % 5] * rng.randrange(1, 9),
            rng.randrange(1, 12),
            budget=rng.choice([None, HOUR]),
            kv_mode=rng.choice(["exact", "reuse"]),
        )
        if isinstance(policy, WantedPolicy):
            policy.wanted[name] = rng.randrange(FULL + 1)
    seen: list[object] = []
    while drive.scheduler.has_work:
        if isinstance(policy, WantedPolicy) and drive.steps % 7 == 3:  # counted alike: at the step that is planned next
            policy.default = None
        plan = drive.step()
        assert plan is not None
        seen.append([(p.request_id, p.submodel, p.start, p.stop, p.pages.tolist()) for p in plan.sequences])
    drive.run()
    assert (drive.seen["planned ahead"] > len(seen) // 2) == ahead
    return seen, {name: drive.tokens(name) for name in drive.asked}


@pytest.mark.parametrize("ask_every", [1, 4])
@pytest.mark.parametrize("num_pages", [1000, 3 * ONE_SEQUENCE, ONE_SEQUENCE])
def test_who_ends_by_length_is_gone_in_time(num_pages: int, ask_every: int) -> None:
    """Nobody stops by a token: then the steps are those that are planned with all results at hand, with the same rows on the
    same pages, also where memory is short."""
    for seed in range(4):
        fields = {"num_pages": num_pages, "ask_every": ask_every, "max_running": 4}
        assert plans(True, seed, **fields) == plans(False, seed, **fields)


def test_who_does_not_leave_in_time_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug of the test before: a row more for everybody who ends by length."""
    expect_tokens = ahead.expect_tokens
    monkeypatch.setattr(ahead, "expect_tokens", lambda plan, requests: expect_tokens(plan, requests)[:0])
    assert plans(True, 0, max_running=4) != plans(False, 0, max_running=4)


# ---- who ends otherwise


def test_a_stop_costs_one_row_and_nothing_else() -> None:
    """Its surplus row runs, its token is not told, its pages are free as soon as the stop is known."""
    drive = Drive(ahead=True, eos=(canned_token(7),))
    stopping = drive.submit(5, 10, sampling={"ignore_eos": False})
    other = drive.submit([50], 10)
    rows: Counter[str] = Counter()
    while drive.scheduler.has_work:
        plan = drive.step()
        assert plan is not None
        rows.update(part.request_id for part in plan.sequences)
        if drive.events[stopping] and isinstance(drive.events[stopping][-1], FinishedEvent):
            held = drive.kv.pool.num_pages - drive.kv.pool.num_free - drive.kv.prefix.idle_pages
            assert held <= sum(drive.kv.geometry.pages_for(12) for _ in drive.scheduler.requests)
    assert drive.tokens(stopping) == [canned_token(position) for position in (5, 6, 7)]
    assert drive.reason(stopping) == "stop"
    assert rows == {stopping: 4, other: 10}
    assert drive.seen["surplus row"] == 1
    assert drive.summary(stopping).submodels == {LADDER.entries[FULL].id: 3}


def test_an_abort_while_two_steps_run() -> None:
    drive = Drive(ahead=True)
    name, other = drive.submit(5, 10), drive.submit(7, 10)
    for _ in range(3):
        drive.step()
    told = len(drive.tokens(name))
    drive.step(lambda: drive.abort(name))
    assert drive.flight is not None
    assert name in {part.request_id for part in drive.flight[0].sequences}
    drive.run()
    assert len(drive.tokens(name)) == told
    assert len(drive.tokens(other)) == 10


def test_an_abort_before_the_last_token_is_told() -> None:
    """The request has left, its token is still on its way: it ends as aborted, once."""
    drive = Drive(ahead=True)
    name = drive.submit(5, 3)
    drive.step()
    drive.step()

    def last() -> None:
        request = drive.request(name)
        assert request.left
        assert request.tokens[-1] == PENDING
        assert drive.scheduler.stats().waiting == 0
        drive.abort(name)

    drive.step(last)
    assert drive.reason(name) == "abort"
    assert len(drive.tokens(name)) == 2
    drive.run()


def test_a_name_given_again_gets_nothing_of_its_namesake() -> None:
    """Two steps run for a request that is aborted, and its name comes back with another prompt before they are booked."""
    drive = Drive(ahead=True)
    name = drive.submit(5, 10)
    for _ in range(2):
        drive.step()
    asked = drive.asked[name]

    def replace() -> None:
        drive.abort(name)
        drive.asked.clear()
        assert drive.submit([50, 51, 52], 6) == name

    drive.step(replace)
    drive.run()
    assert asked is not drive.asked[name]
    assert drive.tokens(name) == [canned_token(3 + number) for number in range(6)]


# ---- what has to wait


@pytest.mark.parametrize(
    "sampling", [{"logprobs": 1}, {"logit_bias": {1: 1.0}}, {"min_tokens": 2}, {"frequency_penalty": 0.5}]
)
def test_what_needs_the_tokens_is_planned_with_them(sampling: dict[str, Any]) -> None:
    drive = Drive(ahead=True)
    special = drive.submit(5, 4, sampling=sampling)
    other = drive.submit(6, 12)
    ahead = 0
    while drive.scheduler.has_work:
        drive.step()
        if special in drive.scheduler.requests:
            assert drive.flight is None
        ahead += drive.flight is not None
    assert ahead > 4
    assert len(drive.tokens(special)) == 4
    assert len(drive.tokens(other)) == 12


def test_a_policy_that_looks_at_confidences_sees_them_all() -> None:
    drive = Drive(policy=make_policy("confidence", Drive().scheduler.rungs), ahead=True)
    drive.submit(5, 6)
    drive.run()
    assert drive.seen["planned ahead"] == 0


def test_who_is_cut_gets_what_is_on_its_way() -> None:
    """Steps of 19 ms: the token that is drawn when the last one that can be in time ends is told."""
    drives = [Drive(ahead=ahead, timed=True) for ahead in (False, True)]
    for drive in drives:
        drive.submit(1, 20, budget=Budget(total_ms=100, policy="cut"), submodel=LADDER.entries[FULL].id)
        drive.run()
        assert drive.summary("r0").cut
    assert drives[0].tokens("r0") == drives[1].tokens("r0")
    assert len(drives[0].tokens("r0")) > 2


def test_the_result_of_a_step_comes_before_the_books_of_the_next() -> None:
    """Blocks are published under their tokens, which must be known."""
    drive = Drive(ahead=True)
    drive.submit(5, 10)
    drive.step()
    scheduler = drive.scheduler
    assert drive.flight is not None
    first = drive.flight[0]
    scheduler.beside(first, drive.now)
    second = scheduler.ahead(first, drive.now)
    assert second is not None
    with pytest.raises(AssertionError, match="booked first"):
        scheduler.beside(second, drive.now)


# ---- on a model

MUST_HAPPEN = (
    "planned ahead",
    "surplus row",
    "partial refill",
    "refill and decode in one segment call",
    "shared block deepened",
    "release then promote",
    "preempt during refill",
    "preempted",
    "prefix hit",
    "states adopted",
    "refill from a state",
)


def asif_run(folder: Path, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    pages, tokens = rng.choice([60, 100, 140]), rng.choice([3, 5, 7, 20])
    harness = Harness(folder, num_pages=pages, max_step_tokens=tokens, ahead=True, stops=tuple(range(0, 101, 9)))
    harness.scheduler.decider.ask_every = rng.choice([1, 3])
    random_run(harness, rng, num_actions=80)
    return harness.seen


def asif_runs(folder: Path, seeds: range) -> Counter[str]:
    return sum((asif_run(folder, seed) for seed in seeds), Counter[str]())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ahead") / "model"


def test_random_schedules_are_as_if(folder: Path) -> None:
    """Stops, aborts, switches, refills, preemptions and shared blocks, all with a step under way."""
    seen = asif_runs(folder, range(14))
    missing = [what for what in MUST_HAPPEN if not seen[what]]
    assert not missing, f"never happened: {missing}; {dict(seen)}"


def _tokens_of_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner mixes up whose token is whose."""
    run = LateTokens.run

    def planted(self: LateTokens, plan: Plan) -> StepResult:
        names = list(self._drew)
        self._drew = {name: self._drew[other] for name, other in zip(names, names[1:] + names[:1], strict=True)}
        return run(self, plan)

    monkeypatch.setattr(LateTokens, "run", planted)


def _pages_stay_with_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of a request that leaves are given back twice: when its last step is launched, and when that is over."""
    end = Scheduler._end

    def planted(self: Scheduler, request: Any) -> None:
        request.left = False
        end(self, request)

    monkeypatch.setattr(Scheduler, "_end", planted)


PLANTED = {
    "tokens of a neighbour": _tokens_of_a_neighbour,
    "left twice": _pages_stay_with_who_left,
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug](monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        asif_runs(folder, range(8))


# ---- in the engine


def engines(tmp_path: Path) -> tuple[Engine, Engine]:
    """One after the other, and ahead, on the same model."""
    make_tiny(tmp_path / "model", "llama", seed=3)
    made = []
    for goes_ahead in (False, True):
        engine = load_engine(tmp_path / "model", max_step_tokens=16)
        steps = Stepper(engine.scheduler, LateTokens(engine.runner), ahead=goes_ahead)
        object.__setattr__(engine, "steps", steps)
        made.append(engine)
    return made[0], made[1]


def test_the_engine_says_the_same_ahead(tmp_path: Path) -> None:
    """Greedy and drawn answers, stops in the middle, penalties and log-probabilities among them."""
    both = []
    asked: list[dict[str, Any]] = [{}, {}, {"logprobs": 2}, {}, {"frequency_penalty": 0.3}, {}, {}]
    for engine in engines(tmp_path):
        requests = [
            ask(
                f"r{number}",
                range(number, number + 3 + number % 4),
                greedy(9 + number, stop_token_ids=tuple(range(0, 101, 7 + number)), **fields),
            )
            for number, fields in enumerate(asked)
        ]
        both.append(
            [(one.tokens, one.submodels, one.finished and one.finished.reason) for one in run(engine, requests)]
        )
    assert both[0] == both[1]
    assert any(reason == "stop" for _, _, reason in both[0])


class Failing(LateTokens):
    """Its steps' results fail while `fails`."""

    fails = False

    def launch(self, plan: Plan) -> Any:
        done, fails = super().launch(plan), self.fails

        class Result:
            def result(self) -> StepResult:
                if fails:
                    raise AssertionError("not finite")
                return done.result()

        return Result()


def test_a_step_that_fails_takes_the_next_one_with_it(tmp_path: Path) -> None:
    """Nobody hears anything of the step behind it; who clears up can go on."""
    engine, _ = engines(tmp_path)
    runner = Failing(engine.runner)
    object.__setattr__(engine, "steps", Stepper(engine.scheduler, runner))
    [plain] = run(engine, [ask("a", [1, 2, 3], greedy(12, ignore_eos=True))])
    engine.scheduler.add(ask("b", [1, 2, 3], greedy(12, ignore_eos=True)))
    events = [event for _ in range(4) for event in engine.step()]
    runner.fails = True
    events += engine.step()  # its result was launched before
    with pytest.raises(AssertionError, match="not finite"):
        engine.step()
    runner.fails = False
    assert engine.scheduler.abort("b", 0.0) is not None
    assert [event.token for event in events if isinstance(event, TokenEvent)] == plain.tokens[: len(events) - 1]
    [again] = run(engine, [ask("c", [1, 2, 3], greedy(12, ignore_eos=True))])
    assert isinstance(again, Outcome)
    assert again.tokens == plain.tokens


def test_a_simulated_device_is_kept_busy(tmp_path: Path) -> None:
    """While it works the next step is launched: nobody who only decodes waits for the host."""
    make_tiny(tmp_path / "model", "llama", seed=3)
    engine = load_engine(tmp_path / "model", simulates="h200")
    runner = engine.runner
    launched, waited = [], 0
    launch = runner.launch  # type: ignore[attr-defined]

    def noting(plan: Plan) -> Any:
        nonlocal waited
        step = launch(plan)
        launched.append(plan.step)

        class Result:
            def result(self) -> StepResult:
                nonlocal waited
                waited += launched[-1] == plan.step
                given: StepResult = step.result()
                return given

        return Result()

    runner.launch = noting  # type: ignore[attr-defined]
    run(engine, [ask(str(number), [1, 2, 3], greedy(20, ignore_eos=True)) for number in range(4)])
    assert len(launched) >= 20
    assert waited == 1, "only the last step has nothing behind it"
