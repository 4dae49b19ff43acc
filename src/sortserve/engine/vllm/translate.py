"""From our requests to vLLM's, as plain values: the arguments of its SamplingParams and the `extra_args` beside them.

No vLLM here, so that the mapping is tested without it. What the scheduler needs to know of a request travels in
`extra_args` under keys of our own, as the types that vLLM lets pass (strings, numbers, lists of them). The same keys are
what a client of a stock `vllm serve` gives as `vllm_xargs`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sortserve.engine.admission import Terms
from sortserve.engine.budget import Budget
from sortserve.engine.errors import RequestError
from sortserve.engine.grammar import WHITESPACE
from sortserve.engine.ladder import Ladder
from sortserve.engine.protocol import GenerateRequest

SUBMODEL, FLOOR, CEILING, BUDGET, SLO, KV, ARRIVAL = KEYS = (
    "sortserve_submodel",  # id: pinned; absent: floor and ceiling hold
    "sortserve_floor",  # id
    "sortserve_ceiling",  # id
    "sortserve_budget",  # [ttft_ms, tpot_ms, total_ms], NOT_ASKED for what is not asked
    "sortserve_slo",  # best-effort, strict, cut
    "sortserve_kv",  # exact, reuse
    "sortserve_arrival",  # seconds since 1970
)
NOT_ASKED = -1.0
_BLANKS = json.dumps({"whitespace_pattern": WHITESPACE})[1:-1]
POLICIES = ("best-effort", "strict", "cut")
KV_MODES = ("exact", "reuse")


def sampling_arguments(request: GenerateRequest, eos_token_ids: Iterable[int] = ()) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams, without `extra_args`.

    Stop strings are not among them: our server looks for them in the text and aborts. An answer of 0 tokens
    (log-probabilities of a prompt alone) is asked for as one of 1, which the reader of the outputs throws away.
    """
    asked = request.sampling
    stops = {*asked.stop_token_ids, *(() if asked.ignore_eos else eos_token_ids)}
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
        "seed": 2**63 - 1 if asked.seed == -1 else asked.seed,  # vLLM's word for none
        "stop_token_ids": sorted(stops),
        "ignore_eos": asked.ignore_eos,
        "logprobs": asked.logprobs,
        "prompt_logprobs": asked.prompt_logprobs,
        "detokenize": False,
    }


def lark(grammar: str) -> str:
    """A grammar of ours (`engine/grammar.py`) in the dialect that vLLM's `guidance` back end takes: Lark alone.

    JSON comes without blanks: the llguidance that vLLM 0.32 is bound to (1.7) does not know `whitespace_pattern`, and
    without an end to them a model may write blanks until max_tokens.
    """
    if grammar.startswith("{"):
        [only] = json.loads(grammar)["grammars"]
        grammar = "start: %json " + json.dumps(only["json_schema"])
    return grammar.replace(_BLANKS, '"whitespace_flexible": false')


def extra_args(request: GenerateRequest, terms: Terms, ladder: Ladder, clock: float) -> dict[str, Any]:
    """What the scheduler reads. `clock`: what to add to a time on the monotonic clock for seconds since 1970."""
    found: dict[str, Any] = {
        FLOOR: ladder.entries[terms.floor].id,
        CEILING: ladder.entries[terms.ceiling].id,
        KV: terms.kv_mode,
        ARRIVAL: request.arrival + clock,
    }
    if request.submodel != "auto":
        found[SUBMODEL] = request.submodel
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
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) != 3
        or not all(isinstance(ms, int | float) for ms in numbers)
    ):
        raise RequestError(
            f"{BUDGET} is {numbers!r}, must be [ttft_ms, tpot_ms, total_ms] with {NOT_ASKED:.0f} for what is not asked",
            param=BUDGET,
        )
    ttft, tpot, total = (None if ms == NOT_ASKED else float(ms) for ms in numbers)
    return Budget(total, ttft, tpot, given.get(SLO, "best-effort"))


def check_extra_args(given: Mapping[str, Any], ladder: Ladder | None = None) -> None:
    """Raise RequestError, NotFoundError for an unknown id, for whatever our keys in `given` say wrong.

    What vLLM's scheduler would pass over in silence is refused here. Ids are only looked up where the ladder is known.
    """
    unknown = sorted(key for key in given if key.startswith("sortserve_") and key not in KEYS)
    if unknown:
        raise RequestError(f"{unknown[0]} is no argument of ours; there are {', '.join(KEYS)}", param=unknown[0])
    budget_of(given)
    if SLO in given and BUDGET not in given:
        raise RequestError(f"{SLO} is {given[SLO]!r} but no {BUDGET} is given", param=SLO)
    for key, choices in ((SLO, POLICIES), (KV, KV_MODES)):
        if key in given and given[key] not in choices:
            raise RequestError(f"{key} is {given[key]!r}, must be one of {', '.join(choices)}", param=key)
    if ARRIVAL in given and not isinstance(given[ARRIVAL], int | float):
        raise RequestError(f"{ARRIVAL} is {given[ARRIVAL]!r}, must be seconds since 1970", param=ARRIVAL)
    places = {key: _place(given, key, ladder) for key in (FLOOR, SUBMODEL, CEILING)}
    for upper in (SUBMODEL, CEILING):
        floor, top = places[FLOOR], places[upper]
        if floor is not None and top is not None and floor > top:
            raise RequestError(f"{FLOOR} {given[FLOOR]!r} is above {upper} {given[upper]!r}", param=FLOOR)


def _place(given: Mapping[str, Any], key: str, ladder: Ladder | None) -> int | None:
    value = given.get(key)
    if value is None or (key == SUBMODEL and value == "auto"):
        return None
    if not isinstance(value, str):
        raise RequestError(f"{key} is {value!r}, must be the id of a sub-model", param=key)
    return None if ladder is None else ladder.place(value, param=key)
