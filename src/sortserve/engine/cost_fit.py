"""From measured steps to a cost table: every term at once, by least squares in which no term may fall with more rows.

A step's time is linear in the table's numbers, so each measurement is one equation. The unknowns are the increments from
bucket to bucket, none of them negative (Lawson and Hanson's algorithm, Solving Least Squares Problems, 1974, chapter 23).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sortserve.engine.cost import CostTable, StepShape
from sortserve.engine.rungs import Floats, Ints

_REWEIGHTINGS = 4
_TOLERATED = 0.05
"""Relative residuals beyond this count less, in proportion: one step beside a busy moment must not bend a whole term."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One step's shape and the seconds it took."""

    shape: StepShape
    seconds: float


def fit_table(
    layers: Ints, buckets: Sequence[int], measured: Sequence[Measured], straightness: float = 0.0
) -> CostTable:
    """The table that comes nearest to what was measured, in relative terms. `straightness`: the weight of one more equation
    for each three buckets in a row, that they lie on a line; where steps were not measured at chosen numbers of rows but
    came as they came, it decides what too few of them tell."""
    at = np.asarray(buckets, np.float64)
    design = np.array([_equation(layers, at, each.shape) for each in measured])
    seconds = np.array([each.seconds for each in measured])
    count = len(at)
    to_terms = np.zeros((design.shape[1],) * 2)  # increments -> values
    for first in (0, count, 2 * count):
        to_terms[first : first + count, first : first + count] = np.tril(np.ones((count, count)))
    to_terms[3 * count :, 3 * count :] = np.eye(3)
    relative = design @ to_terms / seconds[:, None]
    lines = straightness * _lines(at, float(layers.sum()), design.shape[1]) @ to_terms / np.median(seconds)
    scale = np.maximum(
        np.abs(np.concatenate([relative, lines])).max(axis=0), 1e-300
    )  # pairs come in millions, rows in ones
    weights = np.ones(len(seconds))
    for _ in range(_REWEIGHTINGS):
        equations = np.concatenate([relative * weights[:, None], lines]) / scale
        solution = non_negative(equations, np.concatenate([weights, np.zeros(len(lines))]))
        residuals = np.abs(relative / scale @ solution - 1.0)
        weights = np.sqrt(_TOLERATED / np.maximum(residuals, _TOLERATED))
    values = to_terms @ (solution / scale)
    layer, ffn, head = (values[first : first + count] for first in (0, count, 2 * count))
    base, context_seconds, pair_seconds = values[3 * count :].tolist()
    return CostTable(layers, at, layer, ffn, head, base, context_seconds, pair_seconds)


def _equation(layers: Ints, buckets: Floats, shape: StepShape) -> Floats:
    """The step's time as a row of factors of [layer; ffn; head at each bucket, base, context, pairs], as in `CostTable`."""
    layer, ffn = np.zeros(len(buckets)), np.zeros(len(buckets))
    one = _at(buckets, 1.0)
    for segment, rows in enumerate(shape.rows.tolist()):
        if rows > 0:
            here, mean_share = _at(buckets, rows), shape.share[segment] / rows
            layer += layers[segment] * here
            ffn += mean_share * here + max(0.0, shape.widest[segment] - mean_share) * one
    active = shape.rows > 0
    context, pairs = ((layers * each * active).sum() for each in (shape.context, shape.pairs))
    return np.concatenate([layer, ffn, _at(buckets, float(shape.sampled)), [1.0, context, pairs]])


def _lines(buckets: Floats, layers: float, count: int) -> Floats:
    """[equations, count] by how much the third of three buckets in a row lies off the line through the first two, in seconds
    of a step: of the terms of layers, FFNs and head."""
    lines = np.zeros((3, max(len(buckets) - 2, 0), count))
    for equation in range(lines.shape[1]):
        first, second, third = buckets[equation : equation + 3]
        further = (third - second) / (second - first)
        for term, times in enumerate((layers, layers, 1.0)):
            start = term * len(buckets) + equation
            lines[term, equation, start : start + 3] = times * np.array([further, -1.0 - further, 1.0])
    return lines.reshape(-1, count)


def _at(buckets: Floats, rows: float) -> Floats:
    """Factors of a term's values at the buckets that give its value at `rows`."""
    if rows > buckets[-1]:
        return np.where(buckets == buckets[-1], rows / buckets[-1], 0.0)
    if rows <= 0:
        return np.zeros(len(buckets))
    return np.array([np.interp(rows, buckets, unit) for unit in np.eye(len(buckets))])


def non_negative(design: Floats, wanted: Floats) -> Floats:
    """Least squares with no coefficient below 0."""
    count = design.shape[1]
    solution, free = np.zeros(count), np.zeros(count, np.bool_)
    for _ in range(3 * count):
        gradient = design.T @ (wanted - design @ solution)
        gradient[free] = -np.inf
        if gradient.max(initial=-np.inf) <= 1e-10:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(design[:, free], wanted, rcond=1e-12)[0]
            below = free & (trial <= 0)
            if not below.any():
                solution = trial
                break
            step = (solution[below] / np.maximum(solution[below] - trial[below], 1e-300)).min()
            solution = solution + step * (trial - solution)
            free &= solution > 1e-15
            solution[~free] = 0.0
    return solution
