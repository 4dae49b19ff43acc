"""May a request enter, and between which sub-models may it run? Everything refused is refused here, before it waits."""

import math
import random
from dataclasses import dataclass

from sortserve.engine.cost import StepCost
from sortserve.engine.errors import (
    BudgetInfeasibleError,
    ContextLengthError,
    OverloadedError,
    RequestError,
)
from sortserve.engine.estimates import decode_seconds, prefill_seconds
from sortserve.engine.ladder import Ladder
from sortserve.engine.protocol import GenerateRequest, KVMode
from sortserve.engine.rungs import Rungs


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, and how many may wait."""

    max_model_len: int
    vocab_size: int
    max_waiting: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request was admitted with: places in the ladder, K/V mode, and the seed of its random numbers."""

    floor: int
    ceiling: int
    kv_mode: KVMode
    seed: int


def check_request(asked: GenerateRequest, limits: Limits) -> None:
    """Raise RequestError, with the value and the limit, if the request could never be served."""
    num_prompt, max_tokens = len(asked.prompt), asked.sampling.max_tokens
    if num_prompt == 0:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    if num_prompt + max_tokens > limits.max_model_len:
        raise ContextLengthError(
            f"{num_prompt} prompt tokens and max_tokens {max_tokens} are {num_prompt + max_tokens} together, "
            f"the context holds {limits.max_model_len}; shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
    bad = next((token for token in asked.prompt if not 0 <= token < limits.vocab_size), None)
    if bad is not None:
        raise RequestError(f"token id {bad} is not in [0, {limits.vocab_size})", param="prompt")
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(asked.sampling, name):
            if not 0 <= token < limits.vocab_size:
                raise RequestError(f"token id {token} is not in [0, {limits.vocab_size})", param=name)


def resolve_terms(asked: GenerateRequest, ladder: Ladder, unasked: int | None = None) -> Terms:
    """Floor, ceiling and K/V mode: pinned is both; a budget lowers the floor to the smallest entry that is not degraded,
    without one it is `unasked`, the full model if that is None.

    Raises NotFoundError for unknown ids and RequestError for a floor above the pinned sub-model.
    """
    floors = []
    if asked.floor is not None:
        floors.append(ladder.place(asked.floor, param="submodel_floor"))
    if asked.quality_floor is not None:
        if not 0.0 <= asked.quality_floor <= 1.0:
            raise RequestError(f"quality_floor is {asked.quality_floor}, must be in [0, 1]", param="quality_floor")
        floors.append(ladder.quality_floor(asked.quality_floor))
    if asked.submodel != "auto":
        place = ladder.place(asked.submodel)
        if floors and max(floors) > place:
            raise RequestError(
                f"sub-model {asked.submodel!r} is below the floor {ladder.entries[max(floors)].id!r}; drop one of them",
                param="submodel_floor",
            )
        floor = ceiling = place
    else:
        ceiling = ladder.full
        without_budget = ceiling if unasked is None else unasked
        default_floor = without_budget if asked.budget is None else ladder.default_floor
        floor = max(floors) if floors else default_floor
    default_mode: KVMode = "reuse" if asked.submodel == "auto" and asked.budget is not None else "exact"
    mode = asked.kv_mode or default_mode
    seed = asked.sampling.seed if asked.sampling.seed is not None else random.SystemRandom().getrandbits(63)
    return Terms(floor, ceiling, mode, seed)


@dataclass(frozen=True, slots=True)
class Load:
    """What a strict budget is held against."""

    cost: StepCost
    rungs: Rungs
    step_tokens: int
    rows_running: int


def check_strict(asked: GenerateRequest, terms: Terms, load: Load) -> None:
    """Refuse a strict budget that the floor cannot meet: for ever (400) if an idle server could not, else for now (429).

    The answer's length counts only where it is certain (`ignore_eos`), else one token.
    """
    budget = asked.budget
    if budget is None or budget.policy != "strict":
        return
    certain = asked.sampling.max_tokens if asked.sampling.ignore_eos else 1
    param, needed, allowed = _tightest(asked, terms, load, certain, 1)
    if needed > allowed:
        raise BudgetInfeasibleError(
            f"even idle, this server would take {needed / allowed:.1f} times the latency budget; "
            f"the smallest feasible {param} here is about {math.ceil(needed)} ms",
            param=param,
        )
    rows = load.rows_running
    param, needed, allowed = _tightest(asked, terms, load, certain, rows + 1)
    if needed > allowed:
        raise OverloadedError(
            f"under the present load ({rows} running) this would take {needed / allowed:.1f} times the latency "
            f"budget; {param} of about {math.ceil(needed)} ms could be kept now",
            param=param,
            retry_after=decode_seconds(load.cost, load.rungs, {terms.floor: rows + 1}) * 16,
        )


def _tightest(asked: GenerateRequest, terms: Terms, load: Load, num_tokens: int, rows: int) -> tuple[str, float, float]:
    """The constraint that the floor is furthest from keeping: its name, and the milliseconds needed and allowed."""
    assert asked.budget is not None
    step = 1e3 * decode_seconds(load.cost, load.rungs, {terms.floor: rows})
    first = 1e3 * prefill_seconds(load.cost, load.rungs, terms.floor, len(asked.prompt), load.step_tokens)
    first += step if rows > 1 else 0.0
    budget = asked.budget
    constraints = (
        ("latency_budget_ttft_ms", first, budget.ttft_ms),
        ("latency_budget_tpot_ms", step, budget.tpot_ms),
        ("latency_budget_ms", first + (num_tokens - 1) * step, budget.total_ms),
    )
    given = [(name, needed, allowed) for name, needed, allowed in constraints if allowed is not None]
    return max(given, key=lambda constraint: constraint[1] / constraint[2])
