"""How long a step takes: a small model fitted to measurements at warm-up, corrected while serving.

A step's time is  head(sampled rows) + sum over layers of [attention(rows) + ffn(rows) x share of the FFN's width],
each a piecewise linear function of the number of rows, measured at a few row buckets. Segments may run different
numbers of rows. The correction is one factor in [1/4, 4], the running mean of what was measured over what was predicted.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sortserve.engine.ladder import Ladder

Floats = NDArray[np.float64]
DEFAULT_BUCKETS = (1, 4, 16, 64, 256)


MOST_KNOWN = 1024
"""Step times remembered, under a mebibyte: 65,536 of them let the engine grow by a mebibyte a minute for most of an hour."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds by row bucket; `terms` is [3, buckets]: constant with head, per layer, per layer of full FFN width."""

    ladder: Ladder
    buckets: tuple[int, ...]
    terms: Floats
    _known: dict[tuple[tuple[int, float], ...], float] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def fit(
        cls, ladder: Ladder, measure: Callable[[int, int], float], buckets: Sequence[int] = DEFAULT_BUCKETS
    ) -> "StepTimes":
        """Fit to `measure(place, rows)`, the seconds of a decode step of so many rows on a sub-model."""
        places = _telling_places(ladder)
        design = np.array([(1.0, *_layers_and_width(ladder, place)) for place in places])
        terms = np.zeros((3, len(buckets)))
        seconds = np.array([[measure(place, rows) for place in places] for rows in buckets])  # [buckets, places]
        # fewer rows never take longer: what says so was measured while the machine was busy with something else
        seconds = np.minimum.accumulate(seconds[::-1])[::-1]
        for column in range(len(buckets)):
            terms[:, column] = _non_negative_fit(design, seconds[column])
        return cls(ladder, tuple(buckets), np.maximum.accumulate(terms, axis=1))

    def _at(self, term: int, rows: float) -> float:
        """A term at a number of rows; beyond the largest bucket in proportion."""
        last = self.buckets[-1]
        if rows > last:
            return float(self.terms[term, -1] * rows / last)
        return float(np.interp(rows, self.buckets, self.terms[term]))

    def step(self, rows: Iterable[tuple[int, float]]) -> float:
        """Seconds of a step with so many rows on each place, all of them sampled. Remembered: a policy asks for the same
        few shapes at every step, and each took 100 us to work out."""
        counts = tuple(sorted((place, count) for place, count in rows if count > 0))
        if counts not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[counts] = self._step(counts)
        return self._known[counts]

    def _step(self, counts: tuple[tuple[int, float], ...]) -> float:
        total = sum(count for _, count in counts)
        if not counts:
            return 0.0
        seconds = self._at(0, total)
        ladder = self.ladder
        for start, end in zip(ladder.bounds, ladder.bounds[1:], strict=False):
            active = [(place, count) for place, count in counts if ladder.entries[place].submodel.depth >= end]
            if not active:
                break
            num_rows = sum(count for _, count in active)
            shares = [
                sum(ladder.entries[place].submodel.widths[start:end]) / ladder.shape.ffn_width for place, _ in active
            ]
            seconds += (end - start) * self._at(1, num_rows)
            for share, (_, count) in zip(shares, active, strict=True):
                seconds += share * self._at(2, num_rows) * count / num_rows
            # the widest row reads its weights whatever the others do
            widest = max(shares)
            mean = sum(share * count for share, (_, count) in zip(shares, active, strict=True)) / num_rows
            seconds += (widest - mean) * self._at(2, 1)
        return seconds

    def prefill(self, place: int, num_tokens: int, chunk: int) -> float:
        """Seconds to run so many prompt tokens in chunks."""
        whole, rest = divmod(num_tokens, chunk)
        seconds = whole * self.step([(place, chunk)])
        return seconds + (self.step([(place, rest)]) if rest else 0.0)


@dataclass(slots=True)
class Correction:
    """A bounded factor that follows measured over predicted step time."""

    factor: float = 1.0
    weight: float = 0.1
    bound: float = 4.0
    errors: list[float] = field(default_factory=list)  # relative errors of the last steps, for stats
    keep: int = 512

    def observe(self, predicted: float, measured: float) -> None:
        """Learn from one step. `predicted` is without the factor. An outlier moves the factor no more than the bound."""
        if predicted <= 0 or measured <= 0:
            return
        self.errors.append(predicted * self.factor / measured - 1.0)
        del self.errors[: -self.keep]
        ratio = min(max(measured / predicted, 1 / self.bound), self.bound)
        self.factor += self.weight * (ratio - self.factor)


def _layers_and_width(ladder: Ladder, place: int) -> tuple[float, float]:
    submodel = ladder.entries[place].submodel
    return float(submodel.depth), sum(submodel.widths) / ladder.shape.ffn_width


def _telling_places(ladder: Ladder) -> list[int]:
    """The full model, and the entries that differ most from it in depth and in width."""
    full = ladder.full
    places = [full]
    depths = [ladder.entries[place].submodel.depth for place in range(len(ladder.entries))]
    widths = [_layers_and_width(ladder, place)[1] / depths[place] for place in range(len(depths))]
    places.append(min(range(len(depths)), key=lambda place: (depths[place], -widths[place])))
    places.append(min(range(len(depths)), key=lambda place: (widths[place], -depths[place])))
    return sorted(set(places))


def _non_negative_fit(design: Floats, seconds: Floats) -> Floats:
    """Least squares with every coefficient at least 0, by dropping the terms that would be negative."""
    keep = list(range(design.shape[1]))
    while keep:
        solution, *_ = np.linalg.lstsq(design[:, keep], seconds, rcond=None)
        if (solution >= 0).all():
            break
        keep.pop(int(np.argmin(solution)))
    result = np.zeros(design.shape[1])
    if keep:
        result[keep] = solution
    return result
