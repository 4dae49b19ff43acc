"""What the front end makes of the scheduler's reports. Without vLLM."""

import time
from dataclasses import replace

import msgspec
import pytest

from sortserve.engine.admission import resolve_terms
from sortserve.engine.budget import Budget
from sortserve.engine.cost_file import encode_cost
from sortserve.engine.errors import BudgetInfeasibleError, OverloadedError
from sortserve.engine.protocol import EngineStats, GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.vllm.outlook import Outlook
from sortserve.engine.vllm.outputs import Answer
from tests.engine.small import LADDER, step_cost, step_seconds

FULL = LADDER.entries[-1].id


def outlook(**report: object) -> Outlook:
    made = Outlook(LADDER, step_tokens=64, kv_blocks=100)
    decider = {"steps": 70, "cost": encode_cost(step_cost()), "errors": {"decode": [60, 0.05, 0.9]}}
    made.read(msgspec.msgpack.encode({"steps": 80, "kv_usage": 0.25, "decider": decider} | report))
    return made


def asked(budget: Budget | None = None, max_tokens: int = 10) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest("r", (1, 2, 3), sampling, time.monotonic(), budget)


def running(count: int) -> list[Answer]:
    return [Answer(asked(), FULL, accepted=True, num_output=4, submodel=FULL) for _ in range(count)]


def test_nothing_is_known_before_the_first_report() -> None:
    made = Outlook(LADDER, 64, 100)
    strict = asked(Budget(0.1, policy="strict"))
    made.check(strict, resolve_terms(strict, LADDER), 0)
    assert made.one_more(5, []) == {}
    assert made.measured_steps == 0


def test_strict_budgets() -> None:
    """Refused for ever if the floor alone is too slow, for now if only under the present load."""
    made = outlook()
    never = asked(Budget(0.5, policy="strict"))
    with pytest.raises(BudgetInfeasibleError):
        made.check(never, resolve_terms(never, LADDER), 0)
    floor = 1e3 * (10 * step_seconds(0, 1) + step_seconds(0, 3))
    later = asked(Budget(1.3 * floor, policy="strict"))
    made.check(later, resolve_terms(later, LADDER), 0)
    with pytest.raises(OverloadedError):
        made.check(later, resolve_terms(later, LADDER), 60)


def test_one_more_takes_longer_beside_others() -> None:
    idle, busy = (outlook().one_more(5, running(count))[FULL].tpot_seconds for count in (0, 30))
    assert busy > 1.3 * idle


def test_counters_begin_with_the_first_client() -> None:
    counts = {
        "selected": {"d6-w50 deadline": 3, "d6 best": 2},
        "switches": {"up": 1, "down": 4},
        "dropped": {"refused": 1},
    }
    made = outlook(**counts)
    made.forget()
    later = {
        "selected": {"d6-w50 deadline": 5, "d6 best": 2},
        "switches": {"up": 1, "down": 6},
        "dropped": {"refused": 4},
    }
    made.read(msgspec.msgpack.encode({"steps": 90, "kv_usage": 0.5, "decider": {"steps": 75}} | later))
    stats = made.stats(2, 1, EngineStats(prompt_tokens=7, dropped={"queue_full": 1, "overloaded": 2}))
    assert (stats.running, stats.waiting, stats.prompt_tokens, stats.steps) == (2, 1, 7, 90)
    assert stats.selected == {("d6-w50", "deadline"): 2}
    assert stats.switches == {"down": 2}
    assert stats.dropped == {"queue_full": 1, "overloaded": 5}
    assert (stats.kv_pages_total, stats.kv_pages_used) == (100, 50)
    assert made.cost is not None, "a report without costs keeps the last ones"
    assert made.cost.spread == replace(step_cost()).spread
