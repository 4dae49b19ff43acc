"""What the engine predicts of one more request that might come, and whether another step would still be in time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sortserve.engine.cost import StepCost
from sortserve.engine.estimates import by_place, decode_seconds, decode_shape, prefill_shape
from sortserve.engine.ladder import Ladder
from sortserve.engine.policies.protocol import NEVER_RAN
from sortserve.engine.protocol import Prediction
from sortserve.engine.request import Request
from sortserve.engine.rungs import Rungs

CUT_RESERVE_SECONDS = 0.002
"""Kept back by the `cut` policy for the way to the socket."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predictions for the requests that run now. Without a cost model steps take no time."""

    rungs: Rungs
    cost: StepCost | None
    step_tokens: int
    running: Counter[int]  # by place
    context: float  # tokens that each of them knows, on average

    @classmethod
    def of(cls, requests: Iterable[Request], rungs: Rungs, cost: StepCost | None, step_tokens: int) -> "Forecast":
        """Count those that run."""
        running = [request for request in requests if request.running]
        context = sum(len(request.tokens) for request in running) / max(1, len(running))
        return cls(rungs, cost, step_tokens, Counter(request.submodel for request in running), context)

    def too_late(self, request: Request, now: float) -> bool:
        """Whether a step of the shape that runs now would end after the request's total budget."""
        budget = request.asked.budget
        assert budget is not None
        assert budget.total_ms is not None
        shape = self.running if request.running else self.running + Counter([request.floor])
        step = 0.0
        if self.cost is not None:
            step = float(self.cost.p90(decode_shape(self.rungs, by_place(self.rungs, shape), self.context)))
        return now + step + CUT_RESERVE_SECONDS > request.asked.arrival + budget.total_ms / 1e3

    def step_seconds(self) -> float:
        """A step of those that run now."""
        return 0.0 if self.cost is None else decode_seconds(self.cost, self.rungs, self.running, self.context)

    def one_more(self, ladder: Ladder, prompt_tokens: int) -> dict[str, Prediction]:
        """What one more request of that many prompt tokens would take now, by sub-model id."""
        predictions: dict[str, Prediction] = {}
        if self.cost is None:
            return predictions
        for place, entry in enumerate(ladder.entries):
            counts = by_place(self.rungs, {place: self.running.total() + 1})
            step = decode_shape(self.rungs, counts, self.context)
            first = prefill_shape(self.rungs, place, prompt_tokens, self.step_tokens)
            (ttft, tpot), (slow_ttft, slow_tpot) = (
                (float(price(first).sum()), float(price(step))) for price in (self.cost.seconds, self.cost.p90)
            )
            predictions[entry.id] = Prediction(max(ttft, tpot), tpot, max(slow_ttft, slow_tpot), slow_tpot)
        return predictions


def first_place(request: Request) -> int:
    """What a request runs first, as far as known: its floor before it ran."""
    return request.floor if request.submodel == NEVER_RAN else request.submodel
