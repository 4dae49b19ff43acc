"""Widths that differ by layer: where to start a search, from the importance of single neurons.

Neurons are sorted, so a layer at width w loses the importance of its neurons from w on. `allocate` spends a budget of
neurons so that the least is lost in all. It adds up what layers lose by themselves, which is only about right;
the search corrects it.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import ModelShape, SubModel

STEP = 128  # neurons; widths are multiples of it where the FFN is wide enough


def levels(shape: ModelShape, shares: Sequence[float]) -> tuple[int, ...]:
    """Ascending widths for these shares of the FFN, multiples of 128 where it is wide enough; the full width is the last.

    Raises SortingError unless there are 1 to 4 above 0, all different: more blocks would cost more than they save.
    """
    wide = shape.ffn_width >= 4 * STEP
    widths = {shape.ffn_width}
    for share in shares:
        exact = shape.ffn_width * share
        widths.add(round(exact / STEP) * STEP if wide and 0 < share < 1 else round(exact))
    if not 1 <= len(widths - {0}) <= 4 or min(widths) < 0 or max(widths) > shape.ffn_width:
        raise SortingError(f"levels are {sorted(widths)} of {shape.ffn_width} neurons, must be 1 to 4 above 0")
    return tuple(sorted(widths))


def allocate(importance: Tensor, widths: Sequence[int], budget: int) -> SubModel:
    """Widths per layer, of those given, with the least loss of `importance` [layers, neurons] for `budget` neurons.

    Greedy over the lower convex hull of each layer's losses, so each step saves the most neurons for what it loses.
    Neurons must be sorted. Raises SortingError if not even the narrowest widths keep the budget.
    """
    ascending = sorted(widths)
    num_layers = importance.shape[0]
    if ascending[0] * num_layers > budget:
        raise SortingError(f"a budget of {budget} neurons, the narrowest widths come to {ascending[0] * num_layers}")
    lost = [[float(row[width:].sum()) for width in ascending] for row in importance.double()]
    steps = []  # (loss per neuron saved, layer, from, to)
    for layer, losses in enumerate(lost):
        hull = _lower_hull(ascending, losses)
        for narrow, wide in pairwise(hull):
            price = (losses[narrow] - losses[wide]) / (ascending[wide] - ascending[narrow])
            steps.append((price, layer, narrow))
    chosen = [len(ascending) - 1] * num_layers
    total = ascending[-1] * num_layers
    for _, layer, narrow in sorted(steps):
        if total <= budget:
            break
        total -= ascending[chosen[layer]] - ascending[narrow]
        chosen[layer] = narrow
    _spend(lost, ascending, chosen, budget - total)
    return SubModel.make(num_layers, [ascending[level] for level in chosen])


def uniform(shape: ModelShape, budget: int) -> SubModel:
    """One width for all layers within the budget: a multiple of 128 where the FFN is wide enough."""
    width = budget // shape.num_layers
    if shape.ffn_width >= 4 * STEP and width < shape.ffn_width:
        width = width // STEP * STEP
    return SubModel.make(shape.num_layers, min(width, shape.ffn_width))


def _spend(lost: list[list[float]], ascending: Sequence[int], chosen: list[int], left: int) -> None:
    """The last step may have saved more than was needed: raise what fits into the rest and helps most."""
    while True:
        gains = []
        for layer, level in enumerate(chosen):
            if level + 1 < len(ascending) and ascending[level + 1] - ascending[level] <= left:
                gains.append((lost[layer][level] - lost[layer][level + 1], layer))
        if not gains:
            return
        _, layer = max(gains)
        left -= ascending[chosen[layer] + 1] - ascending[chosen[layer]]
        chosen[layer] += 1


def _lower_hull(xs: Sequence[int], ys: Sequence[float]) -> list[int]:
    """Places of the points on the lower convex hull, ascending in x."""
    hull: list[int] = []
    for place in range(len(xs)):
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            slope = (ys[second] - ys[first]) / (xs[second] - xs[first])
            if (ys[place] - ys[second]) / (xs[place] - xs[second]) > slope:
                break
            hull.pop()
        hull.append(place)
    return hull
