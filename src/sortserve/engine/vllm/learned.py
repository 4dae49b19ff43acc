"""What steps cost inside vLLM, learned from the steps that ran: nothing can be profiled there before the scheduler is.

Plain numbers, no vLLM. A first table is fitted once enough steps ran, which the warm-up's requests see to; it is fitted
anew each time that twice as many came, since clients' steps are others than the warm-up's, and every step corrects it.
"""

import random

import numpy as np

from sortserve.engine.cost import CostTable, StepCost, StepShape
from sortserve.engine.cost_fit import Measured, fit_table
from sortserve.engine.cost_model import CostModel
from sortserve.engine.rungs import Floats, Rungs
from sortserve.engine.vllm.deciding import MeasuredStep

ENOUGH_STEPS = 64
"""Measured steps that a first table is fitted to."""
MOST_STEPS = 512
"""Of all measured ones, drawn evenly: a fit to them takes the scheduler some 0.1 s, so there are few fits."""
MOST_BUCKET = 1024
STRAIGHTNESS = 0.7
"""See `fit_table`. Crowded steps are few among those that clients cause: without it those of 256 rows came out 30 % too
cheap."""


class LearnedCost:
    """A cost model that comes to be once enough steps ran, and learns from every later one."""

    def __init__(self, rungs: Rungs) -> None:
        self.model: CostModel | None = None
        self.steps = 0
        self._rungs = rungs
        self._measured: list[Measured] = []
        self._next_fit = ENOUGH_STEPS
        self._draw = random.Random(0)

    @property
    def now(self) -> StepCost:
        """What to price steps with; steps are free before the first fit, so that no deadline seems at risk."""
        return CostTable.free(self._rungs) if self.model is None else self.model

    @property
    def table(self) -> CostTable | None:
        """The table as it is now, corrections included; None before the first fit."""
        return None if self.model is None else self.model.present()

    def note(self, shape: StepShape, seconds: float, between: float | None = None) -> None:
        """A step ran; see `CostModel.note`."""
        if not 0.0 < seconds < np.inf or not (shape.rows > 0).any():
            return
        self.steps += 1
        if self.model is not None:
            self.model.note(shape, seconds, between)
            self.model.learn()
        if len(self._measured) < MOST_STEPS:
            self._measured.append(Measured(shape, seconds))
        elif (place := self._draw.randrange(self.steps)) < MOST_STEPS:
            self._measured[place] = Measured(shape, seconds)
        if self.steps == self._next_fit:
            self._next_fit *= 2
            most = max(float(each.shape.rows.max(initial=1.0)) for each in self._measured)
            powers = int(min(most, MOST_BUCKET)).bit_length()
            buckets = [1 << power for power in range(powers)]
            table = fit_table(self._rungs.layers, buckets, self._measured, STRAIGHTNESS)
            self.model = CostModel(table, 0.0 if self.model is None else self.model.between)


def shape_of(rungs: Rungs, step: MeasuredStep) -> StepShape:
    """The shape of a step that vLLM ran."""
    spread: Floats = np.zeros((4, len(rungs.exits)))  # rows, requests, contexts, pairs; by place
    for place, ran in step.rows.items():
        spread[:, place] = ran
    rows, requests, contexts, pairs = spread
    share = np.where(rows[:, None] > 0, rungs.share, 0.0)
    return StepShape(
        rows @ rungs.runs,
        rows @ rungs.share,
        share.max(0, initial=0.0),
        contexts @ rungs.runs,
        pairs @ rungs.runs,
        np.asarray(float(requests.sum())),
        "mixed" if step.had_prompt else "decode",
    )
