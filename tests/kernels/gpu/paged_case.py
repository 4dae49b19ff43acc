"""Sequences with their K/V scattered over a poisoned pool, and the rows of a step over them."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sortserve.kernels.gpu.attention import AttentionLayer, AttentionScratch, PagedRows, paged_attention, reference
from tests.kernels.closeness import Seeded
from tests.kernels.gpu.guarded import Guarded

PAGE_LAYERS, LAYER = 3, 1

Run = tuple[int, int]  # rows at positions [start, stop) of a sequence of its own; (-1, 0) is a padding row


class Case:
    """Only the K/V of one layer at positions [first seen, stop) are numbers; all else of the pool is NaN (or, for planted
    bugs, random), and the tables name a page of NaN past their end."""

    def __init__(
        self,
        runs: list[Run],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 32,
        size: int = 16,
        dtype: torch.dtype = torch.float32,
        pool_dtype: torch.dtype | None = None,
        tile: int = 1,
        window: int | None = None,
        poisoned: bool = True,
        spare: int = 0,
    ) -> None:
        seeded = Seeded(sum(stop for _, stop in runs) + heads * head_dim + size)
        self.dtype, self.size = dtype, size
        self.layer = AttentionLayer(PAGE_LAYERS, LAYER, kv_heads, window)
        self.pool_dtype = pool_dtype or dtype
        num_rows = sum(stop - start if start >= 0 else 1 for start, stop in runs)
        self.query = seeded.normal(num_rows, heads, head_dim, dtype=dtype)
        blocks = [-(-stop // size) for _, stop in runs]
        free = seeded.permutation(sum(blocks) + 2)
        nobodys = free.pop()
        width = kv_heads * head_dim
        shape = ((sum(blocks) + 2) * 2 * PAGE_LAYERS, size, width)
        self.pool = Guarded(shape, self.pool_dtype)
        if not poisoned:
            self.pool.tensor.copy_(seeded.normal(*shape, scale=2.0))
        tables = torch.full((len(runs), max(blocks) + spare), nobodys, dtype=torch.int32)
        sequence, position, first_row, tile_rows = list[int](), list[int](), list[int](), list[int]()
        for number, (start, stop) in enumerate(runs):
            if start < 0:
                self.query[len(position)] = float("nan")
                sequence.append(0)
                position.append(-1)
                continue
            tables[number, : blocks[number]] = torch.tensor([free.pop() for _ in range(blocks[number])])
            seen = torch.arange(0 if window is None else max(0, start + 1 - window), stop)
            rows = tables[number][seen // size].long() * 2 * PAGE_LAYERS + LAYER
            for which in range(2):
                values = seeded.normal(len(seen), width)
                self.pool.tensor[rows + which * PAGE_LAYERS, seen % size] = values.to(self.pool_dtype)
            for begin in range(start, stop, tile):
                first_row.append(len(position))
                tile_rows.append(min(tile, stop - begin))
                position.extend(range(begin, begin + tile_rows[-1]))
                sequence.extend([number] * tile_rows[-1])
        self.batch = PagedRows(
            tables, ints(sequence), ints(position), ints([*first_row, 0]), ints([*tile_rows, 0]), 0, tile
        )
        self.batch = dataclasses.replace(self.batch, max_context=tables.shape[1] * size)

    def run(self, batch: PagedRows | None = None, scratch: AttentionScratch | None = None, **changed: Any) -> Tensor:
        """Through the kernels, into a guarded output; `changed` of the layer."""
        rows, heads, head_dim = self.query.shape
        out = Guarded((rows, heads * head_dim), self.dtype)
        query, layer = Guarded.of(self.query).tensor, dataclasses.replace(self.layer, **changed)
        result = paged_attention(query, self.pool.tensor, batch or self.batch, layer, scratch=scratch, out=out.tensor)
        assert result is out.tensor
        assert out.untouched()
        assert self.pool.untouched()
        return result

    def expected(self, **changed: Any) -> Tensor:
        return reference(self.query, self.pool.tensor, self.batch, dataclasses.replace(self.layer, **changed))


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode(*contexts: int) -> list[Run]:
    return [(context - 1, context) for context in contexts]
