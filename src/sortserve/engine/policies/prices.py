"""What machine time costs on each place of the ladder: a few numbers from which policies price whole requests.

Steps under load are full, so a row is charged its share of a full step, weights and constant included. What a step really
takes is asked of the step cost itself (`outlook.py`); these numbers only say who costs how much of the machine.
"""

from dataclasses import dataclass

import numpy as np

from sortserve.engine.cost import StepCost, StepShape
from sortserve.engine.rungs import Floats, Rungs

_MANY = 1e5  # K/V tokens, and query x context pairs, by which their price is found
_SAMPLED = 64.0


@dataclass(frozen=True)
class Prices:
    """Seconds of machine time by place; `alone` is a latency, of a step that a lone row has to itself."""

    row: Floats  # [places] one row of a full step
    context: Floats  # [places] one token of K/V read by one row
    pair: Floats  # [places] one query x context pair of a chunk
    sample: float  # logits of one row
    alone: Floats  # [places] a step of one row
    fixed: float  # what a large step takes whatever its number of rows
    sure: float = 1.0  # share of the machine's time that can be counted on: a full step's median over its p90

    @classmethod
    def of(cls, cost: StepCost, rungs: Rungs, step_tokens: int) -> "Prices":
        """Ask for the times of 4 x places + 2 steps in one call."""
        runs, share = rungs.runs.astype(np.float64), rungs.share
        places = len(runs)
        rows = np.concatenate(
            [np.full(3 * places, float(step_tokens)), np.ones(places), [step_tokens, step_tokens / 2]]
        )
        at = np.concatenate([np.tile(np.arange(places), 4), [rungs.full] * 2])
        context, pairs, sampled = np.zeros(len(at)), np.zeros(len(at)), np.zeros(len(at))
        context[places : 2 * places] = _MANY
        pairs[2 * places : 3 * places] = _MANY
        sampled[3 * places : 4 * places] = 1.0
        sampled[-2] = _SAMPLED
        shape = StepShape(
            rows[:, None] * runs[at],
            rows[:, None] * share[at],
            share[at],
            context[:, None] * runs[at],
            pairs[:, None] * runs[at],
            sampled,
            "mixed",
        )
        seconds, p90 = cost.seconds(shape), cost.p90(shape)
        full = seconds[:places]
        return cls(
            full / step_tokens,
            np.maximum(seconds[places : 2 * places] - full, 0.0) / _MANY,
            np.maximum(seconds[2 * places : 3 * places] - full, 0.0) / _MANY,
            max(float(seconds[-2] - full[-1]), 0.0) / _SAMPLED,
            seconds[3 * places : 4 * places],
            max(float(2 * seconds[-1] - full[-1]), 0.0),
            float(full[-1] / p90[rungs.full]) if full[-1] > 0 else 1.0,
        )
