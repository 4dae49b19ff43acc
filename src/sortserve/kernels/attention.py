"""Paged attention on the CPU: gather the pages of a layer, then PyTorch's fused attention.

The pool is one tensor [num_pages * 2 * page_layers, block_tokens, kv_width]: row `page * 2 * g + j` holds the K of the
page's layer j for one block, row `page * 2 * g + g + j` the V. All single rows (decode) of a segment go in one batched
call, padded to the longest context; each run of several rows (prompt chunk, refill) is a call of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowGroup:
    """Rows that attend in one call. `blocks` [2, sequences, blocks] pool rows of K and V for layer 0 of their page; `rows`
    None means all rows of the segment, in order."""

    num_sequences: int
    rows_each: int
    rows: Tensor | slice | None
    blocks: tuple[Tensor, ...]  # one per page of the segment's cell
    make_mask: Callable[[], Tensor | None]

    @cached_property
    def mask(self) -> Tensor | None:
        """Additive, None where nothing is masked. Made when asked for: layers in one call know positions instead."""
        return self.make_mask()


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """All rows of a segment, grouped."""

    num_rows: int
    groups: tuple[RowGroup, ...]


def attend(
    query: Tensor, pool: Tensor, rows: AttentionRows, page: int, layer_in_page: int, num_kv_heads: int
) -> Tensor:
    """query [rows, heads, head_dim] over the K/V in `pool` -> [rows, heads * head_dim]."""
    num_heads, head_dim = query.shape[1:]
    if len(rows.groups) == 1 and rows.groups[0].rows is None:
        return _attend_group(query, pool, rows.groups[0], page, layer_in_page, num_kv_heads)
    out = query.new_empty(rows.num_rows, num_heads * head_dim)
    for group in rows.groups:
        out[group.rows] = _attend_group(query[group.rows], pool, group, page, layer_in_page, num_kv_heads)
    return out


def _attend_group(
    query: Tensor, pool: Tensor, group: RowGroup, page: int, layer_in_page: int, num_kv_heads: int
) -> Tensor:
    num_heads, head_dim = query.shape[1:]
    share = num_heads // num_kv_heads  # query heads on one K/V head
    blocks = group.blocks[page] + layer_in_page
    both = pool.index_select(0, blocks.view(-1)).view(2, group.num_sequences, -1, num_kv_heads, head_dim)
    key, value = both[0].transpose(1, 2), both[1].transpose(1, 2)  # [sequences, kv heads, context, head_dim]
    if group.rows_each == 1:
        # the query heads of one K/V head are the "rows" of the call: no K/V is repeated
        grouped = query.view(group.num_sequences, num_kv_heads, share, head_dim)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=group.mask)
        return out.reshape(group.num_sequences, num_heads * head_dim)
    one = query.transpose(0, 1)[None]  # [1, heads, rows, head_dim]
    out = F.scaled_dot_product_attention(one, key, value, attn_mask=group.mask, enable_gqa=share > 1)
    return out[0].transpose(0, 1).reshape(group.rows_each, num_heads * head_dim)


def causal_mask(
    starts: Sequence[int], rows_each: int, context: int, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """Additive mask [sequences, 1, rows_each, context]: row r of sequence i, at position starts[i] + r, sees positions
    up to its own, and with a sliding window only the last `window` of them."""
    position = torch.tensor(starts)[:, None] + torch.arange(rows_each)[None, :]  # [sequences, rows_each]
    seen = torch.arange(context)[None, None, :]
    hidden = seen > position[:, :, None]
    if window is not None:
        hidden |= seen <= position[:, :, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return mask[:, None]


def reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [heads, head_dim] over keys and values [context, kv_heads, head_dim], in float64 -> [heads, head_dim]."""
    share = query.shape[0] // keys.shape[1]
    wide_keys = keys.double().repeat_interleave(share, dim=1)
    wide_values = values.double().repeat_interleave(share, dim=1)
    scores = torch.einsum("hd,chd->hc", query.double(), wide_keys) / query.shape[-1] ** 0.5
    return torch.einsum("hc,chd->hd", scores.softmax(-1), wide_values)
