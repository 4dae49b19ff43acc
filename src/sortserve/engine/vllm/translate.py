"""From our requests to vLLM's, as plain values: the arguments of its SamplingParams and the `extra_args` beside them.

No vLLM here, so that the mapping is tested without it. What the scheduler needs to know of a request travels in
`extra_args` under keys of our own, as the types that vLLM lets pass (strings, numbers, lists of them). The same keys are
what a client of a stock `vllm serve` gives as `vllm_xargs`.
"""

from collections.abc import Mapping
from typing import Any

from sortserve.engine.budget import Budget
from sortserve.engine.errors import RequestError
from sortserve.engine.protocol import GenerateRequest

SUBMODEL, FLOOR, BUDGET, SLO, ARRIVAL = (
    f"sortserve_{name}" for name in ("submodel", "floor", "budget", "slo", "arrival")
)
QUALITY = "sortserve_quality_floor"
NOT_ASKED = -1.0


def sampling_arguments(request: GenerateRequest) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams. Raises RequestError for what this back end does not do.

    Stop strings are not among them: our server looks for them in the text and aborts. An answer of 0 tokens
    (log-probabilities of a prompt alone) is asked for as one of 1, which the reader of the outputs throws away.
    """
    asked = request.sampling
    if asked.grammar is not None:
        raise RequestError(
            "response_format is not supported by the vllm back end; use `--backend native` for constrained answers",
            param="response_format",
        )
    return {
        "max_tokens": max(1, asked.max_tokens),
        "min_tokens": asked.min_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "repetition_penalty": asked.repetition_penalty,
        "logit_bias": {int(token): bias for token, bias in asked.logit_bias.items()} or None,
        "seed": asked.seed,
        "stop_token_ids": list(asked.stop_token_ids),
        "ignore_eos": asked.ignore_eos,
        "logprobs": asked.logprobs,
        "prompt_logprobs": asked.prompt_logprobs,
        "detokenize": False,
        "extra_args": extra_args(request),
    }


def extra_args(request: GenerateRequest) -> dict[str, Any]:
    """What the scheduler reads: sub-model, floors, budget, and when the request arrived on the monotonic clock."""
    found: dict[str, Any] = {ARRIVAL: request.arrival}
    if request.submodel != "auto":
        found[SUBMODEL] = request.submodel
    if request.floor is not None:
        found[FLOOR] = request.floor
    if request.quality_floor is not None:
        found[QUALITY] = request.quality_floor
    if request.budget is not None:
        budget = request.budget
        found[BUDGET] = [NOT_ASKED if ms is None else ms for ms in (budget.ttft_ms, budget.tpot_ms, budget.total_ms)]
        found[SLO] = budget.policy
    return found


def budget_of(given: Mapping[str, Any]) -> Budget | None:
    """The budget in `extra_args`, None without one. Raises RequestError for values that are none."""
    if BUDGET not in given:
        return None
    numbers = given[BUDGET]
    if not isinstance(numbers, list) or len(numbers) != 3:
        raise RequestError(
            f"{BUDGET} is {numbers!r}, must be [ttft_ms, tpot_ms, total_ms] with {NOT_ASKED:.0f} for what is not asked",
            param=BUDGET,
        )
    ttft, tpot, total = (None if ms == NOT_ASKED else ms for ms in numbers)
    return Budget(total, ttft, tpot, given.get(SLO, "best-effort"))
