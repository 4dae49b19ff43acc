"""Steps, one after the other, with as much of the host's work as possible beside the runner's.

A runner that works on its own is never waited for with nothing behind it, where that can be (`Scheduler.ahead`):

    device   |   step 1   |   step 2   |   step 3   |
    host      book K/V of 1, plan 2, launch 2 | take tokens of 1, book K/V of 2, plan 3, launch 3 | ...

Else a long step's bookkeeping is done in a helper's thread, and a short one's after it.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sortserve.engine.cost import StepShape
from sortserve.engine.cost_model import CostModel
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.plan import LaunchedStep, LaunchingRunner, Plan, StepResult, StepRunner
from sortserve.engine.protocol import Event
from sortserve.engine.scheduler import Scheduler

Tell = Callable[[list[Event]], None]

IDLE_SECONDS = 0.001
LONG_STEP_SECONDS = 0.02
"""Bookkeeping is done beside steps at least so long: Python's lock is free most of such a step, not of a short one."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched, and is neither waited for nor booked yet."""

    plan: Plan
    step: LaunchedStep


class Stepper:
    """Runs what the scheduler plans. Not thread-safe."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, *, ahead: bool = True) -> None:
        """`ahead` False: a step is planned when the one before it is booked, whatever the runner can do."""
        self._scheduler = scheduler
        self._runner = runner
        self._launching = runner if isinstance(runner, LaunchingRunner) else None
        self._ahead = ahead
        self._flight: Flight | None = None
        self._ended: float | None = None  # when the last step's result was there; None: nothing was left to do then
        self._helper = ThreadPoolExecutor(1, "beside")  # one thread; it never calls torch

    def step(self, tell_early: Tell | None = None) -> list[Event]:
        """One step, planned now or launched before; the events it gave, none if there was nothing to do.

        `tell_early` is given what planning alone decided (who was accepted), not returned then. What a runner raises is
        passed on; nothing of the requests in that step or the next one can be trusted then.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            plan = self._scheduler.schedule(time.monotonic())
            if plan is None:
                return self._nothing()
            self._tell(tell_early)
            if self._launching is None:
                result, shape = self._run(plan)
                return self._book(plan, result, shape)
            flight = Flight(plan, self._launching.launch(plan))
        assert self._launching is not None
        ends = self._ends()
        shape = self._beside(flight.plan, ends)
        following = self._scheduler.ahead(flight.plan, ends) if self._ahead else None
        launched = None if following is None else Flight(following, self._launching.launch(following))
        self._tell(tell_early)
        result = flight.step.result()
        self._flight = launched  # a step after one that failed is not looked at
        return self._book(flight.plan, result, shape)

    @property
    def _cost(self) -> CostModel | None:
        cost = self._scheduler.cost
        return cost if isinstance(cost, CostModel) else None

    def _ends(self) -> float:
        """When a step that starts now will have ended, by the last one."""
        return time.monotonic() + (0.0 if self._cost is None else self._cost.last_seconds)

    def _nothing(self) -> list[Event]:
        events = self._scheduler.take_events()
        if self._scheduler.requests and not events:
            time.sleep(IDLE_SECONDS)  # everybody sits out, until time changes the policy's mind
        return events

    def _tell(self, tell_early: Tell | None) -> None:
        if tell_early is not None:
            tell_early(self._scheduler.take_events())

    def _run(self, plan: Plan) -> tuple[StepResult, StepShape | None]:
        """Run a step, and do beside it what need not wait for its end, if it is long enough."""
        beside = None
        if self._cost is not None and self._cost.last_seconds >= LONG_STEP_SECONDS:
            beside = self._helper.submit(self._beside, plan, self._ends())
        try:
            result = self._runner.run(plan)
        finally:
            if beside is not None:
                beside.result()
        return result, self._beside(plan, time.monotonic()) if beside is None else beside.result()

    def _beside(self, plan: Plan, now: float) -> StepShape | None:
        """What need not wait for the end of a running plan. Returns its shape, where its time is to be learned from."""
        self._scheduler.beside(plan, now)
        if self._cost is None:
            return None
        self._cost.learn()
        return shape_of_parts(self._scheduler.rungs, plan.sequences)

    def _book(self, plan: Plan, result: StepResult, shape: StepShape | None) -> list[Event]:
        now = time.monotonic()
        if self._cost is not None and shape is not None:
            between = None if self._ended is None else now - self._ended - result.seconds
            self._cost.note(shape, result.seconds, between)
        events = self._scheduler.update(plan, result, now)
        self._ended = now if self._scheduler.requests else None
        return events
