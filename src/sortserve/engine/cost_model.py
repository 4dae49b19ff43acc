"""The cost of a step as it was measured at start, corrected by every step that runs.

Three kinds of factor, each bounded, all learned from the same residual (the logarithm of measured over predicted, clipped,
so that one pause of the machine moves nothing far): the speed of the machine now, followed within some ten steps; one per
kind of step; and one per term of the table (weights by number of rows, head, K/V reads, pairs), followed slowly. The 90th
percentile is the running one of what was left over, by kind.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from sortserve.engine.cost import CostTable, StepKind, StepShape
from sortserve.engine.rungs import Floats

KINDS: tuple[StepKind, ...] = get_args(StepKind)
SPEED_GAIN, KIND_GAIN, TERM_GAIN = 0.15, 0.05, 0.05
SPEED_BOUND, KIND_BOUND, TERM_BOUND = math.log(4.0), math.log(1.5), math.log(2.0)
CLIP = 0.25
"""A residual counts for at most so much: 28 % over or 22 % under. Larger ones are pauses, or a machine that changed, which
a few steps tell just as well."""
REMEMBERED = 200
"""Residuals by kind that quantiles are taken of."""
NEW_SPREAD = 1.25
"""p90 over median before there are residuals to tell."""
BETWEEN_GAIN = 0.05
MOST_BETWEEN = 0.01
"""Seconds between two steps beyond as many as a step takes: more are a pause."""


@dataclass(frozen=True, slots=True)
class StepError:
    """How well steps of one kind were predicted, of the last ones: median of |measured / predicted - 1|, and the share that
    took no longer than their p90."""

    steps: int
    median: float
    covered: float


class CostModel:
    """A StepCost that learns. Not thread-safe."""

    def __init__(self, table: CostTable, between: float = 0.0) -> None:
        self.table = table  # as fitted
        self._now = table  # with the factors of its terms
        self._speed = 0.0  # logarithms of factors
        self._kinds = dict.fromkeys(KINDS, 0.0)
        self._rows: Floats = np.zeros(len(table.buckets))
        self._others: Floats = np.zeros(3)  # base and head, K/V reads, pairs
        self._ratios: dict[StepKind, deque[tuple[float, bool]]] = {kind: deque(maxlen=REMEMBERED) for kind in KINDS}
        self._spread = dict.fromkeys(KINDS, NEW_SPREAD)
        self.last_seconds = 0.0  # of the last step noted
        self.between = (
            between  # seconds from one step to the next, of late: what a step takes of the machine beside itself
        )
        self._noted: list[tuple[StepShape, float]] = []

    @property
    def factor(self) -> float:
        """Speed of the machine now over that at start; above 1 it is slower."""
        return math.exp(self._speed)

    def present(self) -> CostTable:
        """The table with what was learned until now; of the factors by kind of step, that of decoding."""
        table = self._now.scaled(math.exp(self._speed + self._kinds["decode"]))
        return replace(table, base=table.base + self.between, spread=self._spread["decode"])

    def start_at(self, shape: StepShape, seconds: float) -> None:
        """The machine's speed at the start, from one step: a table that was fitted at another time is off by that."""
        predicted = float(self.table.seconds(shape))
        if predicted > 0.0 and seconds > 0.0:
            self._speed = _bounded(math.log(seconds / predicted), SPEED_BOUND)

    def seconds(self, shape: StepShape) -> Floats:
        """Median seconds, [...]."""
        return self._now.seconds(shape) * math.exp(self._speed + self._kinds[shape.kind]) + self.between

    def p90(self, shape: StepShape) -> Floats:
        """Seconds that nine of ten such steps stay under, [...]."""
        return self.seconds(shape) * self._spread[shape.kind]

    def note(self, shape: StepShape, seconds: float, between: float | None = None) -> None:
        """A step ran, and began so long after the one before it, None if nothing was to do meanwhile; `learn` makes
        something of it when nobody waits."""
        self.last_seconds = seconds
        if between is not None:
            most = self.last_seconds + MOST_BETWEEN
            self.between += BETWEEN_GAIN * (min(max(between, 0.0), most) - self.between)
        self._noted.append((shape, seconds))

    def learn(self) -> None:
        """Learn from the steps that were noted."""
        noted, self._noted = self._noted, []
        for shape, seconds in noted:
            self.observe(shape, seconds)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from one step. What cannot be a time is passed over."""
        terms = self._now.terms(shape)
        plain = float(terms[0]) + float(terms[1].sum()) + float(terms[2]) + float(terms[3])
        kind = shape.kind
        predicted = plain * math.exp(self._speed + self._kinds[kind])
        if not (0.0 < predicted < math.inf and 0.0 < seconds < math.inf):
            return
        ratio = seconds / predicted
        residuals = self._ratios[kind]
        residuals.append((ratio, ratio <= self._spread[kind]))
        if (len(residuals) >= 10 and len(residuals) % 10 == 0) or len(residuals) == REMEMBERED:
            self._spread[kind] = max(1.0, float(np.quantile([each for each, _ in residuals], 0.9)))
        left_over = min(max(math.log(ratio), -CLIP), CLIP)
        self._speed = _bounded(self._speed + SPEED_GAIN * left_over, SPEED_BOUND)
        self._kinds[kind] = _bounded(self._kinds[kind] + KIND_GAIN * left_over, KIND_BOUND)
        self._learn_terms(shape.rows, terms, plain, TERM_GAIN * left_over)

    def _learn_terms(self, rows: Floats, terms: Sequence[Floats], plain: float, step: float) -> None:
        """Each term moves by its share of the step, so that all together move by about `step`."""
        by_rows = _hats(self.table.buckets, rows, terms[1]) / plain
        others = np.array([float(terms[0]), float(terms[2]), float(terms[3])]) / plain
        norm = float(by_rows @ by_rows + others @ others)
        self._rows = np.clip(self._rows + step * by_rows / norm, -TERM_BOUND, TERM_BOUND)
        self._others = np.clip(self._others + step * others / norm, -TERM_BOUND, TERM_BOUND)
        factors, (fixed, context, pairs) = np.exp(self._rows), np.exp(self._others)
        table = self.table
        self._now = replace(
            table,
            layer=table.layer * factors,
            ffn=table.ffn * factors,
            head=table.head * fixed,
            base=table.base * fixed,
            context_seconds=table.context_seconds * context,
            pair_seconds=table.pair_seconds * pairs,
        )

    def errors(self) -> dict[StepKind, StepError]:
        """By kind of step, of those that ran."""
        told: dict[StepKind, StepError] = {}
        for kind, residuals in self._ratios.items():
            if residuals:
                ratios = np.array([ratio for ratio, _ in residuals])
                covered = sum(inside for _, inside in residuals) / len(residuals)
                told[kind] = StepError(len(residuals), float(np.median(np.abs(ratios - 1.0))), covered)
        return told


def _hats(buckets: Floats, rows: Floats, amounts: Floats) -> Floats:
    """[buckets] of the amounts [segments], each split between the two buckets next to its number of rows."""
    split = np.zeros(len(buckets))
    place = np.interp(rows, buckets, np.arange(len(buckets)))
    below = place.astype(np.int64)
    above = np.minimum(below + 1, len(buckets) - 1)
    part = place - below
    np.add.at(split, below, amounts * (1.0 - part))
    np.add.at(split, above, amounts * part)
    return split


def _bounded(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)
