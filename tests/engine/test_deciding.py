"""The policy's own time: where steps are short it is asked less often, and nobody waits for it alone."""

import time

from sortserve.engine.cost_model import CostModel
from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.protocol import Decision, View
from tests.engine.small import LADDER, step_cost
from tests.engine.test_scheduler import Drive

STEP_SECONDS = 0.004


class Slow(FixedPolicy):
    """Takes as long as half a step."""

    def decide(self, view: View) -> Decision:
        time.sleep(STEP_SECONDS / 2)
        return super().decide(view)


def driven(step_seconds: float) -> Drive:
    drive = Drive(policy=Slow(LADDER.full), ask_every=8)
    cost = CostModel(step_cost(LADDER))
    cost.last_seconds = step_seconds
    drive.scheduler.cost = cost
    return drive


def rows(drive: Drive) -> set[str]:
    plan = drive.step()
    return set() if plan is None else {part.request_id for part in plan.sequences}


def test_who_arrives_waits_for_a_few_short_steps() -> None:
    drive = driven(STEP_SECONDS)
    first = drive.submit(2, 16)
    assert rows(drive) == {first}
    second = drive.submit(2, 4)
    steps = [rows(drive) for _ in range(9)]
    assert steps[:4] == [{first}] * 4, "an answer as long as half a step, at most a tenth of the time"
    assert {first, second} in steps
    drive.run()


def test_long_steps_wait_for_the_policy() -> None:
    drive = driven(100 * STEP_SECONDS)
    first = drive.submit(2, 16)
    assert rows(drive) == {first}
    second = drive.submit(2, 4)
    assert rows(drive) == {first, second}
    drive.run()


def test_nobody_waits_while_nothing_else_runs() -> None:
    drive = driven(STEP_SECONDS)
    first = drive.submit(2, 1)
    assert rows(drive) == {first}
    second = drive.submit(2, 4)
    assert rows(drive) == {second}
    drive.run()
