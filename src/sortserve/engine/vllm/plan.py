"""Which rows run which layers in one step: a batch of requests at different depths, as segments of row prefixes.

Requests are ordered deepest first, so those that go on behind an exit are the first ones, and everything that vLLM keeps
by row (hidden states, slots, block tables, lengths) is cut to a view. Pure: no torch, no vLLM.

    layers   0 ... 2 ... 4 ......... 8
    row 0    ########################      exit 8
    row 1    ########################      exit 8
    row 2    ############                  exit 4
    row 3    ######                        exit 2
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers [start, end), which the first `num_requests` requests, the first `num_tokens` rows, run."""

    start: int
    end: int
    num_requests: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `places` [requests] of the ladder and `tokens` [requests] scheduled, deepest first; `segments` that at
    least one request runs, ascending."""

    places: tuple[int, ...]
    tokens: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(self.tokens)

    def of_layer(self, layer: int) -> Segment | None:
        """The segment with `layer`; None if nobody gets that far."""
        return next((segment for segment in self.segments if segment.start <= layer < segment.end), None)


def deepest_first(exits: Sequence[int]) -> list[int]:
    """The order of requests, by index, that puts the highest exit first and keeps the order of equals."""
    return sorted(range(len(exits)), key=lambda row: -exits[row])


def swaps(order: Sequence[int]) -> list[tuple[int, int]]:
    """Exchanges of two rows, to be done one after the other, that bring row order[i] to i for every i."""
    found = []
    at = list(range(len(order)))  # at[i]: the original row that is now at i
    where = list(range(len(order)))  # where[r]: where original row r is now
    for target, row in enumerate(order):
        source = where[row]
        if source != target:
            found.append((target, source))
            moved = at[target]
            at[target], at[source] = row, moved
            where[row], where[moved] = target, source
    return found


def plan_step(places: Sequence[int], tokens: Sequence[int], exits: Sequence[int], bounds: Sequence[int]) -> StepPlan:
    """The plan of requests that are already ordered deepest first.

    `exits` [places] is the number of segments each place runs; segment s is layers [bounds[s], bounds[s + 1]).
    """
    depth = [exits[place] for place in places]
    assert all(above >= below for above, below in itertools.pairwise(depth)), "rows are not deepest first"
    segments = []
    for number in range(max(depth, default=0)):
        inside = sum(exit > number for exit in depth)
        segments.append(Segment(bounds[number], bounds[number + 1], inside, sum(tokens[:inside])))
    return StepPlan(tuple(places), tuple(tokens), tuple(segments))
