"""Paged K/V on the CPU in PyTorch's calls: what rows write, and its fused attention over the gathered pages of a layer.

The pool is one tensor [num_pages * 2 * page_layers, block_tokens, kv_width]: row `page * 2 * g + j` holds the K of the
page's layer j for one block, row `page * 2 * g + g + j` the V. All sequences with a single row (decode) go in one batched
call, padded to the longest context; each one with several (prompt chunk, refill) is a call of its own.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowGroup:
    """Rows that attend in one call: `rows_each` of each of some sequences. `blocks` [2, sequences, blocks], by page: pool
    rows of K and V of the page's first layer. `mask` is additive; None: nothing is masked."""

    rows_each: int
    rows: Tensor | slice
    blocks: tuple[Tensor, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionRows:
    """Rows of a segment, those of a sequence beside each other, and where K and V of their sequences lie.

    `tables`, one for each page of the segment's cell: the pool's rows of the K of the page's first layer, by sequence and
    block; those of other layers follow, and `page_layers` further on the V.
    """

    positions: Tensor  # int64 [rows]
    sequences: Tensor  # int64 [rows], places in the tables
    writes: Tensor | None  # bool [rows], which write their K and V; None: all
    tables: tuple[Tensor, ...]  # int64 [sequences, most blocks]
    block_tokens: int
    page_layers: int
    window: int | None  # positions that a row sees, its own among them
    dtype: torch.dtype  # of K and V

    def only(self, rows: Tensor) -> "AttentionRows":
        """Some of the rows, which have written."""
        return replace(self, positions=self.positions[rows], sequences=self.sequences[rows], writes=None)

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """All rows as PyTorch's calls take them. Made when asked for: layers in one call know positions instead."""
        found = np.unique(self.sequences.numpy(), return_index=True, return_counts=True)
        numbers, firsts, counts = (torch.from_numpy(one) for one in found)
        groups, single = [], counts == 1
        if single.any():
            groups.append(self._group(numbers[single], firsts[single], 1))
        for number, first, count in zip(numbers.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            if count > 1:
                groups.append(self._group(slice(number, number + 1), slice(first, first + count), count))
        return tuple(groups)

    def _group(self, sequences: Tensor | slice, rows: Tensor | slice, rows_each: int) -> RowGroup:
        positions = self.positions[rows].view(-1, rows_each)
        lowest, highest = (int(one) for one in positions.aminmax())
        num_blocks = highest // self.block_tokens + 1
        context = num_blocks * self.block_tokens
        mask = None
        if rows_each > 1 or self.window is not None or lowest < context - 1:
            mask = causal_mask(positions, context, self.dtype, self.window)
        keys = [table[sequences, :num_blocks] for table in self.tables]
        blocks = tuple(torch.stack([key, key + self.page_layers]) for key in keys)
        return RowGroup(rows_each, rows, blocks, mask)

    @cached_property
    def slots(self) -> tuple[Tensor, ...]:
        """By page, [2, writers]: token slots of the pool, of K and V of the page's first layer."""
        chosen = slice(None) if self.writes is None else self.writes
        positions, sequences = self.positions[chosen], self.sequences[chosen]
        blocks, places = positions // self.block_tokens, positions % self.block_tokens
        keys = [table[sequences, blocks] * self.block_tokens + places for table in self.tables]
        return tuple(torch.stack([key, key + self.page_layers * self.block_tokens]) for key in keys)


def write(key: Tensor, value: Tensor, pool: Tensor, rows: AttentionRows, layer: int) -> None:
    """Put K and V [rows, kv heads, head_dim] of a segment's layer into `pool`, of the rows that write."""
    page, layer_in_page = divmod(layer, rows.page_layers)
    slots = rows.slots[page] + layer_in_page * rows.block_tokens
    both = torch.stack([key, value])  # [2, rows, kv heads, head_dim]
    if rows.writes is not None:
        both = both[:, rows.writes]
    kv_width = pool.shape[-1]
    pool.view(-1, kv_width).index_copy_(0, slots.view(-1), both.view(-1, kv_width))


def attend(query: Tensor, pool: Tensor, rows: AttentionRows, layer: int, num_kv_heads: int) -> Tensor:
    """query [rows, heads, head_dim] over the K/V of a segment's layer in `pool` -> [rows, heads * head_dim]."""
    page, layer_in_page = divmod(layer, rows.page_layers)
    if len(rows.groups) == 1:
        return _attend_group(query, pool, rows.groups[0], page, layer_in_page, num_kv_heads)
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    for group in rows.groups:
        out[group.rows] = _attend_group(query[group.rows], pool, group, page, layer_in_page, num_kv_heads)
    return out


def _attend_group(
    query: Tensor, pool: Tensor, group: RowGroup, page: int, layer_in_page: int, num_kv_heads: int
) -> Tensor:
    num_heads, head_dim = query.shape[1:]
    share = num_heads // num_kv_heads  # query heads on one K/V head
    blocks = group.blocks[page] + layer_in_page
    both = pool.index_select(0, blocks.view(-1)).view(2, blocks.shape[1], -1, num_kv_heads, head_dim)
    key, value = both[0].transpose(1, 2), both[1].transpose(1, 2)  # [sequences, kv heads, context, head_dim]
    if group.rows_each == 1:
        # the query heads of one K/V head are the "rows" of the call: no K/V is repeated
        grouped = query.view(-1, num_kv_heads, share, head_dim)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=group.mask)
        return out.reshape(-1, num_heads * head_dim)
    one = query.transpose(0, 1)[None]  # [1, heads, rows, head_dim]
    out = F.scaled_dot_product_attention(one, key, value, attn_mask=group.mask, enable_gqa=share > 1)
    return out[0].transpose(0, 1).reshape(group.rows_each, num_heads * head_dim)


def causal_mask(positions: Tensor, context: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Additive mask [sequences, 1, rows each, context] of rows at `positions` [sequences, rows each]: each sees positions
    up to its own, and with a sliding window only the last `window` of them."""
    position, seen = positions[:, :, None], torch.arange(context)
    hidden = seen > position
    if window is not None:
        hidden |= seen <= position - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return mask[:, None]


def reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [heads, head_dim] over keys and values [context, kv_heads, head_dim], in float64 -> [heads, head_dim]."""
    share = query.shape[0] // keys.shape[1]
    wide_keys = keys.double().repeat_interleave(share, dim=1)
    wide_values = values.double().repeat_interleave(share, dim=1)
    scores = torch.einsum("hd,chd->hc", query.double(), wide_keys) / query.shape[-1] ** 0.5
    return torch.einsum("hc,chd->hd", scores.softmax(-1), wide_values)
