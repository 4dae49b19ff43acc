"""Widths that differ by layer: `allocate` spends a budget of neurons so that the least is lost in all.

What a layer loses at a width is from slopes (`slopes`), measured where all layers are narrow together, because losses of
layers do not add up from where all others are whole.
"""

from collections.abc import Sequence
from itertools import pairwise

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


def fine_levels(shape: ModelShape, narrowest: float) -> tuple[int, ...]:
    """Every multiple of 128 from about this share of the FFN on, of a 16th where it is too narrow; the full width is last.

    A layer's blocks end at the widths that the ladder's entries have there, whatever other layers have: with three
    budgets and the full width that is four blocks at most, so levels may be as fine as the kernels like.
    """
    step = STEP if shape.ffn_width >= 4 * STEP else max(1, shape.ffn_width // 16)
    first = max(step, round(narrowest * shape.ffn_width / step) * step)
    return (*range(first, shape.ffn_width, step), shape.ffn_width)


def allocate(losses: Sequence[Sequence[float]], widths: Sequence[int], budget: int) -> SubModel:
    """Widths per layer, of those given, with the least sum of `losses` [layers][widths] for `budget` neurons.

    Greedy over the lower convex hull of each layer's losses, so each step saves the most neurons for what it loses.
    Raises SortingError if not even the narrowest widths keep the budget.
    """
    ascending = sorted(widths)
    num_layers = len(losses)
    if ascending[0] * num_layers > budget:
        raise SortingError(f"a budget of {budget} neurons, the narrowest widths come to {ascending[0] * num_layers}")
    steps = []  # (loss per neuron saved, layer, wider level, level)
    for layer, row in enumerate(losses):
        for narrow, wide in pairwise(_lower_hull(ascending, row)):
            price = (row[narrow] - row[wide]) / (ascending[wide] - ascending[narrow])
            steps.append((price, layer, -wide, narrow))
    chosen = [len(ascending) - 1] * num_layers
    total = ascending[-1] * num_layers
    for _, layer, _, narrow in sorted(steps):
        if total <= budget:
            break
        total -= ascending[chosen[layer]] - ascending[narrow]
        chosen[layer] = narrow
    _spend(losses, ascending, chosen, budget - total)
    return SubModel.make(num_layers, [ascending[level] for level in chosen])


def uniform(shape: ModelShape, budget: int) -> SubModel:
    """One width for all layers within the budget: a multiple of 128 where the FFN is wide enough."""
    width = budget // shape.num_layers
    if shape.ffn_width >= 4 * STEP and width < shape.ffn_width:
        width = width // STEP * STEP
    return SubModel.make(shape.num_layers, min(width, shape.ffn_width))


def _spend(lost: Sequence[Sequence[float]], ascending: Sequence[int], chosen: list[int], left: int) -> None:
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
