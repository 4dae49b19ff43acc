"""A step's plan as tensors: for each layer, which rows run which FFN blocks and whose attention is added."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.engine.ladder import Ladder
from sortserve.engine.vllm.plan import Segment, StepPlan


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Rows that run one FFN block. `first`: the first so many, None: those of `index`. `limit` [rows] is the width of
    each where one ends inside the block, else None."""

    first: int | None
    index: Tensor | None = None
    limit: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerRows:
    """One layer. `blocks` that somebody runs, None: all rows run all. `attention` [rows, 1], 0 where attention is not
    added, None: added everywhere."""

    blocks: tuple[BlockRows, ...] | None = None
    attention: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepRows:
    """A plan and, for each layer that runs, its rows."""

    plan: StepPlan
    layers: tuple[LayerRows, ...]  # [layers to run]


ALL_ROWS = LayerRows()


class RowLayouts:
    """Makes StepRows; the last one is kept, since in steady decoding every step has the same."""

    def __init__(self, ladder: Ladder, device: torch.device) -> None:
        self._submodels = [entry.submodel for entry in ladder.entries]
        self._boundaries = [ladder.ffn_boundaries(layer) for layer in range(ladder.shape.num_layers)]
        self._device = device
        self._last: StepRows | None = None

    def of(self, plan: StepPlan) -> StepRows:
        """The rows of `plan`."""
        if self._last is None or self._last.plan != plan:
            made: dict[object, LayerRows] = {}
            layers = [
                self._layer(plan, segment, layer, made)
                for segment in plan.segments
                for layer in range(segment.start, segment.end)
            ]
            self._last = StepRows(plan, tuple(layers))
        return self._last

    def _layer(self, plan: StepPlan, segment: Segment, layer: int, made: dict[object, LayerRows]) -> LayerRows:
        tokens = plan.tokens[: segment.num_requests]
        submodels = [self._submodels[place] for place in plan.places[: segment.num_requests]]
        widths = tuple(submodel.widths[layer] for submodel in submodels)
        on = tuple(layer not in submodel.skip_attention for submodel in submodels)
        key = (len(tokens), widths, on, self._boundaries[layer])
        if key not in made:
            boundaries = self._boundaries[layer]
            blocks = None if min(widths) == boundaries[-1] else block_rows(widths, tokens, boundaries, self._device)
            attention = None if all(on) else _spread(on, tokens, self._device)[:, None]
            made[key] = LayerRows(blocks, attention)
        return made[key]


def block_rows(
    widths: Sequence[int], tokens: Sequence[int], boundaries: Sequence[int], device: torch.device
) -> tuple[BlockRows, ...]:
    """Which rows run the FFN blocks that end at `boundaries`; `widths` and `tokens` by request, 0: no FFN."""
    blocks = []
    start = 0
    for end in boundaries:
        inside = [width > start for width in widths]
        if not any(inside):
            break
        count = sum(inside)
        rows = sum(number for number, there in zip(tokens, inside, strict=True) if there)
        index = None
        if not all(inside[:count]):
            index = _spread(inside, tokens, device).nonzero().flatten()
        chosen = [(width, number) for width, number, there in zip(widths, tokens, inside, strict=True) if there]
        limit = None
        if min(width for width, _ in chosen) < end:
            limit = _spread([width for width, _ in chosen], [number for _, number in chosen], device)
        blocks.append(BlockRows(rows if index is None else None, index, limit))
        start = end
    return tuple(blocks)


def _spread(values: Sequence[int], tokens: Sequence[int], device: torch.device) -> Tensor:
    """[rows]: each request's value for each of its rows."""
    spread = torch.tensor(values, dtype=torch.int64).repeat_interleave(torch.tensor(tokens, dtype=torch.int64))
    return spread.to(device)
