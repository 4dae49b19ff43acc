"""Requests to vLLM's arguments and its outputs to events, without vLLM."""

import random
import time

import pytest

from sortserve.engine.budget import Budget, BudgetPolicy
from sortserve.engine.errors import RequestError
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
from sortserve.engine.vllm.translate import budget_of, extra_args, sampling_arguments


def request(**fields: object) -> GenerateRequest:
    given: dict[str, object] = {"request_id": "r", "prompt": (1, 2, 3), "arrival": time.monotonic()}
    sampling = fields.pop("sampling", SamplingParams(max_tokens=8))
    return GenerateRequest(**(given | {"sampling": sampling} | fields))  # type: ignore[arg-type]


def test_budgets_survive_the_way_through_extra_args() -> None:
    rng = random.Random(5)
    for _ in range(200):
        numbers = [rng.choice((None, rng.uniform(0.1, 5000.0))) for _ in range(3)]
        if all(ms is None for ms in numbers):
            continue
        policy: BudgetPolicy = rng.choice(("strict", "best-effort", "cut"))
        budget = Budget(numbers[0], numbers[1], numbers[2], policy)
        assert budget_of(extra_args(request(budget=budget))) == budget
    assert budget_of(extra_args(request())) is None


@pytest.mark.parametrize("bad", ["soon", [1.0], [1.0, 2.0, 0.0], [-1.0, -1.0, -1.0], [float("nan"), -1.0, -1.0]])
def test_a_budget_that_is_none_is_a_mistake_of_the_request(bad: object) -> None:
    with pytest.raises(RequestError):
        budget_of({translate.BUDGET: bad})


def test_only_what_was_asked_for_is_passed_on() -> None:
    assert set(extra_args(request())) == {translate.ARRIVAL}
    asked = request(submodel="d8", floor="d4", quality_floor=0.5)
    assert extra_args(asked) == {
        translate.ARRIVAL: asked.arrival,
        translate.SUBMODEL: "d8",
        translate.FLOOR: "d4",
        translate.QUALITY: 0.5,
    }


def test_sampling() -> None:
    asked = SamplingParams(max_tokens=0, prompt_logprobs=2, seed=7, stop=("x",), stop_token_ids=(5,))
    given = sampling_arguments(request(sampling=asked))
    assert (given["max_tokens"], given["seed"], given["stop_token_ids"]) == (1, 7, [5])
    assert "stop" not in given, "our server looks for stop strings itself"
    with pytest.raises(RequestError, match="native"):
        sampling_arguments(request(sampling=SamplingParams(grammar="start: /a/")))


def test_sub_models_are_told_token_by_token() -> None:
    """Whatever vLLM merged: the runs are of the whole answer."""
    answer = Answer(request(), "d8")
    first = answer.take(Output([4], told={"runs": [["d8", 1]], "cached": 2}), 10.0)
    assert isinstance(first[0], AcceptedEvent)
    assert (first[0].submodel, first[0].cached_tokens) == ("d8", 2)
    merged = answer.take(Output([5, 6, 7], told={"runs": [["d8", 2], ["d4", 1], ["d2", 1]]}), 11.0)
    assert [(event.token, event.submodel) for event in merged if isinstance(event, TokenEvent)] == [
        (5, "d8"),
        (6, "d4"),
        (7, "d2"),
    ]
    [end] = answer.take(Output([], finish_reason="stop", told={"runs": [["d8", 2], ["d4", 1], ["d2", 1]]}), 12.0)
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
    events = answer.take(Output([7], [made], prompt, told={"runs": [["d8", 1]]}), 1.0)
    [said] = [event for event in events if isinstance(event, PromptLogprobsEvent)]
    assert [None if one is None else (one.token, one.logprob, one.top) for one in said.logprobs] == [
        None,
        (2, -1.0, ((9, -0.1),)),
        (3, -0.5, ((3, -0.5),)),
    ]
    [token] = [event for event in events if isinstance(event, TokenEvent)]
    assert token.logprob is not None
    assert (token.logprob.logprob, token.logprob.top) == (-4.0, ((5, -0.2), (6, -0.9)))


def test_an_answer_of_no_tokens_has_none() -> None:
    answer = Answer(request(sampling=SamplingParams(max_tokens=0, prompt_logprobs=0)), "d8")
    prompt = [None, {2: (-1.0, 1)}, {3: (-0.5, 1)}]
    events = answer.take(Output([7], None, prompt, "length"), 1.0)
    assert [type(event) for event in events] == [AcceptedEvent, PromptLogprobsEvent, FinishedEvent]


def test_refused() -> None:
    [event] = Answer(request(), "d8").take(Output([], None, None, "abort", {"refused": "too late"}), 1.0)
    assert isinstance(event, FailedEvent)
    assert (event.error, event.message) == ("OverloadedError", "too late")
