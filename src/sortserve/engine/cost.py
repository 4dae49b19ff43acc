"""What a step costs: seconds as a function of the rows in each segment, of K/V read, and of rows sampled. No torch.

    seconds = base + head(sampled) + sum over segments of
              layers x layer(rows) + share x ffn(rows) + layers x (context x context_seconds + pairs x pair_seconds)

`layer`, `ffn` and `head` are monotone and piecewise linear in the number of rows. The widest row reads its FFN weights
whatever the others do: the share that only it needs costs what one row costs. A cost is near a maximum, not a sum: the
first row of a segment pays for its weights, further ones for little until computing takes over from reading.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from sortserve.engine.rungs import Floats, Ints, Rungs

StepKind = Literal["decode", "mixed", "refill"]
"""Single rows only; with chunks of a prompt; with rows that deepen tokens computed before. Errors are told apart by it."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the time of a step depends on. Leading dimensions, if any, are candidates that are priced together."""

    rows: Floats  # [..., segments] rows that run
    share: Floats  # [..., segments] FFN share of all these rows together: sum of their `Rungs.share`
    widest: Floats  # [..., segments] the largest `Rungs.share` among them
    context: Floats  # [..., segments] tokens whose K/V are read, each sequence's once
    pairs: Floats  # [..., segments] query x context pairs of chunks with more than one row
    sampled: Floats  # [...] rows that get logits
    kind: StepKind = "decode"


class StepCost(Protocol):
    """Prices steps. What policies, admission and the simulator ask; corrected while serving where it is measured."""

    def seconds(self, shape: StepShape) -> Floats:
        """Median seconds of each candidate, [...]."""
        ...

    def p90(self, shape: StepShape) -> Floats:
        """Seconds that nine of ten such steps stay under, [...]."""
        ...

    @property
    def last_seconds(self) -> float:
        """What the last step took; 0 where that is not known."""
        ...


@dataclass(frozen=True)
class CostTable:
    """Terms of the formula above, in seconds."""

    layers: Ints  # [segments]
    buckets: Floats  # [buckets] ascending numbers of rows
    layer: Floats  # [buckets] one layer without its FFN
    ffn: Floats  # [buckets] one FFN at full width
    head: Floats  # [buckets] final norm, head and sampling, by rows sampled
    base: float = 0.0  # of every step
    context_seconds: float = 0.0  # per layer and K/V token read
    pair_seconds: float = 0.0  # per layer and query x context pair of a chunk
    spread: float = 1.0  # p90 over median

    @classmethod
    def free(cls, rungs: Rungs) -> "CostTable":
        """Steps that take no time: what is decided by where nothing was measured, so that no deadline is at risk."""
        return cls(rungs.layers, np.ones(1), np.zeros(1), np.zeros(1), np.zeros(1))

    def seconds(self, shape: StepShape) -> Floats:
        """Median seconds, [...]."""
        fixed, weights, context, pairs = self.terms(shape)
        total: Floats = fixed + weights.sum(-1) + context + pairs
        return total

    def terms(self, shape: StepShape) -> tuple[Floats, Floats, Floats, Floats]:
        """What the seconds are the sum of: base and head [...], weights by segment [..., segments], K/V read [...], and
        pairs [...]."""
        rows, active = shape.rows, shape.rows > 0
        beyond = bool(rows.max(initial=0.0) > self.buckets[-1])
        mean_share = shape.share / np.maximum(rows, 1.0)
        weights = self.layers * self._at(self.layer, rows, beyond) + mean_share * self._at(self.ffn, rows, beyond)
        weights = weights + np.maximum(shape.widest - mean_share, 0.0) * self._ffn_of_one
        context = (self.layers * shape.context * active).sum(-1) * self.context_seconds
        pairs = (self.layers * shape.pairs * active).sum(-1) * self.pair_seconds
        head = np.where(shape.sampled > 0, self._at(self.head, shape.sampled), 0.0)
        return self.base + head, np.where(active, weights, 0.0), context, pairs

    def scaled(self, factor: float) -> "CostTable":
        """Every time of this table, times `factor`."""
        return replace(
            self,
            layer=self.layer * factor,
            ffn=self.ffn * factor,
            head=self.head * factor,
            base=self.base * factor,
            context_seconds=self.context_seconds * factor,
            pair_seconds=self.pair_seconds * factor,
        )

    def p90(self, shape: StepShape) -> Floats:
        """Median times `spread`, [...]."""
        return self.seconds(shape) * self.spread

    @property
    def last_seconds(self) -> float:
        """A table sees no steps."""
        return 0.0

    def _at(self, term: Floats, rows: Floats, beyond: bool = True) -> Floats:
        """A term at numbers of rows above 0; beyond the largest bucket, where some may be, in proportion."""
        value: Floats = np.interp(rows, self.buckets, term)
        return np.where(rows > self.buckets[-1], term[-1] * rows / self.buckets[-1], value) if beyond else value

    @cached_property
    def _ffn_of_one(self) -> Floats:
        """[1] the FFN of a single row: what reading its weights takes."""
        return self._at(self.ffn, np.ones(1))


SIGNALS_SHARE = 0.01
"""Of a layer at full width, by rows sampled: what the depth head may cost at most."""


def with_signals(cost: StepCost) -> StepCost:
    """A table of steps whose depth head is read at every token, from one of steps where it is not. Other kinds of cost
    stay as they are: what was measured with the signals has them. Their softmax reads logits that sampling reads anyway."""
    if not isinstance(cost, CostTable):
        return cost
    return replace(cost, head=cost.head + SIGNALS_SHARE * (cost.layer + cost.ffn))
