"""The policies inside vLLM: the view that is made of the scheduler's records, and costs that are learned from steps."""

import math

import numpy as np
import pytest

from sortserve.engine.budget import Budget
from sortserve.engine.cost import StepShape
from sortserve.engine.estimates import decode_shape, prefill_shape
from sortserve.engine.policies.protocol import NEVER_RAN, Reason
from sortserve.engine.vllm.deciding import CeilingDecider, Choice, Record
from sortserve.engine.vllm.policy import ENOUGH_STEPS, PolicyDecider
from tests.engine.small import LADDER, step_cost

FULL = LADDER.full


def record(request_id: str = "r", **fields: object) -> Record:
    given: dict[str, object] = {
        "arrival": 100.0,
        "num_prompt": 20,
        "num_output": 0,
        "num_computed": 0,
        "max_tokens": 50,
        "ignore_eos": True,
        "floor": 0,
        "ceiling": FULL,
    }
    return Record(request_id, **(given | fields))  # type: ignore[arg-type]


def decider(policy: str = "slack") -> PolicyDecider:
    return PolicyDecider(LADDER, policy, step_tokens=64, max_running=8)


def taught(policy: str = "slack") -> PolicyDecider:
    """One that has seen steps of the synthetic machine."""
    made, cost = decider(policy), step_cost()
    rng = np.random.default_rng(3)
    while made.cost.model is None:
        counts = np.zeros(len(LADDER.entries))
        counts[rng.integers(len(counts))] = rng.integers(1, 9)
        shapes = [decode_shape(made.rungs, counts, 30.0)]
        chunks = prefill_shape(made.rungs, int(rng.integers(len(counts))), 40, 64)
        for shape in shapes:
            made.note(shape, float(cost.seconds(shape)))
        for place in range(len(chunks.sampled)):
            names = ("rows", "share", "widest", "context", "pairs", "sampled")
            one = StepShape(**{name: getattr(chunks, name)[place] for name in names}, kind="mixed")
            made.note(one, float(cost.seconds(one)))
    return made


def test_costs_come_from_the_steps_that_ran() -> None:
    made, cost = taught(), step_cost()
    for place, rows in ((0, 1), (FULL, 1), (FULL, 4)):
        counts = np.zeros(len(LADDER.entries))
        counts[place] = rows
        shape = decode_shape(made.rungs, counts, 30.0)
        assert float(made.cost.now.seconds(shape)) == pytest.approx(float(cost.seconds(shape)), rel=0.15)


def test_nothing_is_predicted_before_enough_steps_ran() -> None:
    made = decider()
    tight = record(budget=Budget(total_ms=0.1))
    assert made.decide([tight], 100.0)["r"].place == FULL
    assert ENOUGH_STEPS > 1


def test_a_tight_budget_gets_less_and_an_ample_one_all() -> None:
    made = taught()
    seconds = 50 * float(made.cost.now.seconds(decode_shape(made.rungs, np.eye(len(LADDER.entries))[FULL], 40.0)))
    tight, ample = record("tight", budget=Budget(total_ms=500 * seconds)), record("ample", budget=Budget(3e6))
    assert made.decide([tight], 100.0)["tight"].place < FULL
    assert taught().decide([ample], 100.0)["ample"].place == FULL


@pytest.mark.parametrize("policy", ["slack", "global-cap", "slackfit", "admission-only", "reject-only", "fixed"])
def test_floors_ceilings_and_refusals(policy: str) -> None:
    """Hopeless and strict ones are refused at most before they ran; nobody leaves floor and ceiling."""
    made = taught(policy)
    rng = np.random.default_rng(8)
    for now in np.linspace(100.0, 101.0, 12):
        records = []
        for number in range(10):
            floor = int(rng.integers(len(LADDER.entries)))
            ceiling = int(rng.integers(floor, len(LADDER.entries)))
            ran = bool(rng.integers(2))
            records.append(
                record(
                    f"{now}-{number}",
                    floor=floor,
                    ceiling=ceiling,
                    place=int(rng.integers(floor, ceiling + 1)) if ran else NEVER_RAN,
                    running=ran,
                    num_output=3 if ran else 0,
                    num_computed=22 if ran else 0,
                    first_token=100.0 if ran else None,
                    budget=Budget(float(rng.uniform(0.1, 900)), policy="strict") if number % 2 else None,
                )
            )
        choices = made.decide(records, float(now))
        for each in records:
            choice = choices[each.request_id]
            assert each.floor <= choice.place <= each.ceiling
            assert not choice.refuse or (each.place == NEVER_RAN and each.budget is not None)


def test_the_view_says_what_the_records_say() -> None:
    made = taught()
    running = record(place=2, running=True, num_output=4, num_computed=23, first_token=100.2, last_switch=1)
    view = made.view([running, record("waiting", budget=Budget(ttft_ms=500.0, total_ms=2000.0))], 101.0)
    exit = int(made.rungs.exits[2])
    assert view.computed[0].tolist() == [23] * exit + [0] * (made.rungs.num_segments - exit)
    assert view.computed[1].sum() == 0
    assert (view.tokens_since_switch[0], view.expected_left[0]) == (3, 46)
    assert math.isinf(view.first_due[0])
    assert (view.first_due[1], view.last_due[1]) == (100.5, 102.0)
    assert view.capabilities == frozenset()


def test_cut() -> None:
    """A request is ended where one more token would come after its total."""
    made = taught("fixed")
    budget = Budget(total_ms=1000.0, policy="cut")
    going = record(place=FULL, running=True, num_output=4, num_computed=23, first_token=100.2, budget=budget)
    assert not made.decide([going], 100.5)["r"].cut
    assert taught("fixed").decide([going], 100.9999)["r"].cut


def test_without_a_policy_everybody_runs_the_best() -> None:
    assert CeilingDecider().decide([record(ceiling=1)], 0.0) == {"r": Choice(1, Reason.FIXED)}
