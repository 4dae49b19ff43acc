"""A step's plan as tensors: for each layer, each row's FFN width, and whose attention is added."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sortserve.engine.ladder import Ladder
from sortserve.engine.vllm.plan import Segment, StepPlan
from sortserve.kernels.ffn import FfnRows, plan_rows


@dataclass(frozen=True, slots=True)
class Shard:
    """What a tensor-parallel rank has of a layer's FFN: neurons `rank`, `rank` + `ranks` and so on of `full`. `boundaries`
    are the ends of its blocks. `is_packed`: it is told its rows also where all of them have the full width."""

    full: int
    boundaries: tuple[int, ...]
    rank: int = 0
    ranks: int = 1
    is_packed: bool = False

    def own(self, width: int) -> int:
        """Neurons of this rank among the first `width`: a prefix of its own."""
        return (width - self.rank + self.ranks - 1) // self.ranks

    def packed(self, boundaries: Sequence[int]) -> "Shard":
        """Of weights in blocks of their own."""
        return replace(self, boundaries=tuple(boundaries), is_packed=True)


@dataclass(frozen=True, slots=True)
class LayerRows:
    """One layer. `ffn`: widths of the rows, None: all run all neurons. `attention` [rows, 1], 0 where attention is not
    added, None: added everywhere."""

    ffn: FfnRows | None = None
    attention: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepRows:
    """A plan and, for each layer that runs, its rows."""

    plan: StepPlan
    layers: tuple[LayerRows, ...]  # [layers to run]


class RowLayouts:
    """Makes StepRows; the last one is kept, since in steady decoding every step has the same."""

    def __init__(self, ladder: Ladder, shards: Sequence[Shard], dtype: torch.dtype, device: torch.device) -> None:
        """`shards` [layers]; `dtype` of the hidden states."""
        self._submodels = [entry.submodel for entry in ladder.entries]
        self._shards = tuple(shards)
        self._dtype, self._device = dtype, device
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
        shard = self._shards[layer]
        widths = tuple(submodel.widths[layer] for submodel in submodels)
        on = tuple(layer not in submodel.skip_attention for submodel in submodels)
        key = (len(tokens), widths, on, shard)
        if key not in made:
            ffn = None
            if shard.is_packed or min(widths) < shard.full:
                own = _spread([shard.own(width) for width in widths], tokens)
                ffn = _to(plan_rows(own, shard.boundaries, self._dtype), self._device)
            attention = None
            if not all(on):
                attention = torch.tensor(_spread(on, tokens), device=self._device)[:, None]
            made[key] = LayerRows(ffn, attention)
        return made[key]


def _spread(values: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """[rows]: each request's value for each of its rows."""
    return [value for value, number in zip(values, tokens, strict=True) for _ in range(number)]


def _to(rows: FfnRows, device: torch.device) -> FfnRows:
    """`rows` with their tensors on `device`."""
    blocks = tuple(
        replace(
            block,
            index=None if block.index is None else block.index.to(device),
            mask=None if block.mask is None else block.mask.to(device),
        )
        for block in rows.blocks
    )
    return replace(rows, blocks=blocks, widths=rows.widths.to(device))
