"""Requests to vLLM's arguments and its outputs to events, without vLLM."""

import random
import time

import pytest

from sortserve.engine.admission import resolve_terms
from sortserve.engine.budget import Budget, BudgetPolicy
from sortserve.engine.errors import RequestError
from sortserve.engine.grammar import check_grammar, json_grammar
from sortserve.engine.protocol import (
    AcceptedEvent,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    PromptLogprobsEvent,
    TokenEvent,
)
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.vllm import translate
from sortserve.engine.vllm.outputs import Answer, Output
from sortserve.engine.vllm.tracking import read_request
from sortserve.engine.vllm.translate import budget_of, check_extra_args, extra_args, lark, sampling_arguments
from tests.engine.small import LADDER

FULL, SMALLEST = LADDER.entries[-1].id, LADDER.entries[0].id


def request(**fields: object) -> GenerateRequest:
    given: dict[str, object] = {"request_id": "r", "prompt": (1, 2, 3), "arrival": time.monotonic()}
    sampling = fields.pop("sampling", SamplingParams(max_tokens=8))
    return GenerateRequest(**(given | {"sampling": sampling} | fields))  # type: ignore[arg-type]


def sent(asked: GenerateRequest, clock: float = 0.0) -> dict[str, object]:
    return extra_args(asked, resolve_terms(asked, LADDER), LADDER, clock)


def test_budgets_survive_the_way_through_extra_args() -> None:
    rng = random.Random(5)
    for _ in range(200):
        numbers = [rng.choice((None, rng.uniform(0.1, 5000.0))) for _ in range(3)]
        if all(ms is None for ms in numbers):
            continue
        policy: BudgetPolicy = rng.choice(("strict", "best-effort", "cut"))
        budget = Budget(numbers[0], numbers[1], numbers[2], policy)
        given = sent(request(budget=budget))
        assert budget_of(given) == budget
        check_extra_args(given, LADDER)
        assert read_request(given, LADDER, 0.0, (time.time(), time.monotonic()), None).budget == budget
    assert budget_of(sent(request())) is None


@pytest.mark.parametrize(
    "bad", ["soon", [1.0], [1.0, 2.0, 0.0], [-1.0, -1.0, -1.0], [float("nan"), -1.0, -1.0], ["1", 2, 3]]
)
def test_a_budget_that_is_none_is_a_mistake_of_the_request(bad: object) -> None:
    with pytest.raises(RequestError):
        check_extra_args({translate.BUDGET: bad})


@pytest.mark.parametrize(
    "bad",
    [
        {"sortserve_depth": 3},
        {translate.SUBMODEL: 3},
        {translate.SUBMODEL: "d99"},
        {translate.SLO: "strict"},
        {translate.SLO: "soon", translate.BUDGET: [1.0, -1.0, -1.0]},
        {translate.KV: "some"},
        {translate.ARRIVAL: "now"},
        {translate.FLOOR: FULL, translate.SUBMODEL: SMALLEST},
        {translate.FLOOR: FULL, translate.CEILING: SMALLEST},
    ],
)
def test_arguments_that_the_scheduler_would_pass_over(bad: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        check_extra_args(bad, LADDER)


def test_arguments_of_others_are_theirs() -> None:
    check_extra_args({"other": object(), translate.SUBMODEL: "auto"}, LADDER)


def test_the_scheduler_reads_the_terms_that_were_resolved() -> None:
    """Defaults are resolved in front, so that both sides agree: the full model without a budget, the default floor with."""
    clock = time.time() - time.monotonic()
    for asked, floor, ceiling, pinned, exact in (
        (request(), LADDER.full, LADDER.full, False, True),
        (request(budget=Budget(500.0)), LADDER.default_floor, LADDER.full, False, False),
        (request(submodel=SMALLEST, budget=Budget(500.0)), 0, 0, True, True),
        (request(floor=LADDER.entries[3].id, budget=Budget(500.0), kv_mode="exact"), 3, LADDER.full, False, True),
    ):
        read = read_request(sent(asked, clock), LADDER, 0.0, (time.time(), time.monotonic()), None)
        assert (read.floor, read.ceiling, read.pinned, read.exact) == (floor, ceiling, pinned, exact)
        assert read.arrival == pytest.approx(asked.arrival, abs=0.01)


def test_what_another_front_end_leaves_out() -> None:
    """A stock vLLM server sends nothing of ours: the full model, unless there is a budget."""
    now = (time.time(), time.monotonic())
    assert read_request(None, LADDER, now[0], now, None).floor == LADDER.full
    only = {translate.BUDGET: [500, -1, -1]}
    assert read_request(only, LADDER, now[0], now, None).floor == LADDER.default_floor


def test_sampling() -> None:
    asked = SamplingParams(max_tokens=0, prompt_logprobs=2, seed=7, stop=("x",), stop_token_ids=(5,))
    given = sampling_arguments(request(sampling=asked), (2, 5))
    assert (given["max_tokens"], given["seed"], given["stop_token_ids"]) == (1, 7, [2, 5])
    assert "stop" not in given, "our server looks for stop strings itself"
    assert sampling_arguments(request(sampling=SamplingParams(ignore_eos=True)), (2,))["stop_token_ids"] == []
    assert sampling_arguments(request(sampling=SamplingParams(seed=-1)))["seed"] not in (None, -1), "-1 is none there"


def test_grammars_are_lark() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = lark(json_grammar(schema))
    assert made.startswith("start: %json {")
    assert '"whitespace_flexible": false' in made
    assert "whitespace_pattern" not in made
    check_grammar(made)
    assert lark("start: /a/") == "start: /a/"


def test_sub_models_are_told_token_by_token() -> None:
    """Whatever vLLM merged: the runs are of the whole answer."""
    answer = Answer(request(), "d8")
    told = {"submodels": [["d8", 1]], "foretold": [1.5, False]}
    first = answer.take(Output([4], told=told, cached=2), 10.0)
    assert isinstance(first[0], AcceptedEvent)
    assert (first[0].submodel, first[0].cached_tokens) == ("d8", 2)
    assert (first[0].predicted_seconds, first[0].predicted_met) == (1.5, False)
    merged = answer.take(Output([5, 6, 7], told={"submodels": [["d8", 2], ["d4", 1], ["d2", 1]]}), 11.0)
    assert [(event.token, event.submodel) for event in merged if isinstance(event, TokenEvent)] == [
        (5, "d8"),
        (6, "d4"),
        (7, "d2"),
    ]
    assert answer.made == {"d8": 2, "d4": 1, "d2": 1}
    [end] = answer.take(Output([], finish_reason="stop", told={"submodels": [["d8", 2], ["d4", 1], ["d2", 1]]}), 12.0)
    assert isinstance(end, FinishedEvent)
    assert (end.reason, end.summary.submodels, end.summary.switches) == ("stop", {"d8": 2, "d4": 1, "d2": 1}, 2)
    assert end.summary.met is None


def test_a_budget_is_judged_by_when_tokens_came() -> None:
    for late in (False, True):
        asked = request(budget=Budget(total_ms=1000.0))
        answer = Answer(asked, "d8")
        answer.take(Output([4]), asked.arrival + 0.5)
        *_, end = answer.take(Output([5], finish_reason="length"), asked.arrival + (1.5 if late else 0.9))
        assert isinstance(end, FinishedEvent)
        assert end.summary.met is not late


def test_log_probabilities() -> None:
    """Best first, no more than asked for, and the token's own where it is not among them."""
    asked = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=1)
    answer = Answer(request(sampling=asked), "d8")
    prompt = [None, {2: (-1.0, 3), 9: (-0.1, 1)}, {3: (-0.5, 1)}]
    made = {7: (-4.0, 30), 5: (-0.2, 1), 6: (-0.9, 2)}
    events = answer.take(Output([7], [made], prompt, told={"submodels": [["d8", 1]]}), 1.0)
    [said] = [event for event in events if isinstance(event, PromptLogprobsEvent)]
    assert [None if one is None else (one.token, one.logprob, one.top) for one in said.logprobs] == [
        None,
        (2, -1.0, ((9, -0.1),)),
        (3, -0.5, ((3, -0.5),)),
    ]
    [token] = [event for event in events if isinstance(event, TokenEvent)]
    assert token.logprob is not None
    assert (token.logprob.logprob, token.logprob.top) == (-4.0, ((5, -0.2), (6, -0.9)))
    later = answer.take(Output([7], [made], [], told={"submodels": [["d8", 2]]}), 2.0)
    assert [type(event) for event in later] == [TokenEvent], "vLLM gives an empty list with every further output"


def test_an_answer_of_no_tokens_has_none() -> None:
    answer = Answer(request(sampling=SamplingParams(max_tokens=0, prompt_logprobs=0)), "d8")
    prompt = [None, {2: (-1.0, 1)}, {3: (-0.5, 1)}]
    events = answer.take(Output([7], None, prompt, "length"), 1.0)
    assert [type(event) for event in events] == [AcceptedEvent, PromptLogprobsEvent, FinishedEvent]


def test_refused() -> None:
    answer = Answer(request(), "d8")
    [event] = answer.take(Output([], None, None, "abort", {"refused": True}), 1.0)
    assert answer.over
    assert isinstance(event, FailedEvent)
    assert (event.error, event.retry_after) == ("OverloadedError", 1.0)


def test_cut_before_the_first_token() -> None:
    """Whoever waits for its beginning hears of one."""
    asked = request(budget=Budget(total_ms=1.0, policy="cut"))
    begun, end = Answer(asked, "d8").take(Output([], None, None, "length", {"cut": True}), 1.0)
    assert isinstance(begun, AcceptedEvent)
    assert isinstance(end, FinishedEvent)
    assert (end.reason, end.summary.cut, end.summary.met) == ("length", True, False)


def test_aborted() -> None:
    answer = Answer(request(), "d8")
    answer.take(Output([4], told={"submodels": [["d8", 1]], "recomputed_tokens": 6}), 10.0)
    end = answer.aborted(11.0)
    assert (end.reason, end.summary.submodels, end.summary.refilled_tokens) == ("abort", {"d8": 1}, 6)
    assert answer.over
