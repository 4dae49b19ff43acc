"""What the paged attention kernels share: the rows, where a token's K/V lies, one step of the online softmax.

The pool is [num_pages * 2 * g, block_tokens, kv_heads * head_dim]: page p holds the K of its layer j in row p * 2g + j
and the V in row p * 2g + g + j (kernels/attention.py). A sequence's table lists its pages in one page column.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
NO_WINDOW = 1 << 30  # longer than any context


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a call. Everything on the device may change between replays of a graph; the two numbers are fixed.

    A tile is a run of rows of one sequence with consecutive positions; every row that attends lies in exactly one.
    """

    tables: Tensor  # int32 [sequences, max_blocks]: pages; entries past a sequence's context are never read
    row_sequence: Tensor  # int32 [rows]: row of `tables`
    row_position: Tensor  # int32 [rows]: attends to positions up to this one; -1: attends to nothing and gets zeros
    tile_first_row: Tensor  # int32 [tiles]
    tile_rows: Tensor  # int32 [tiles], 0: unused
    max_context: int  # tokens, an upper bound of row_position + 1 that sizes the grid
    max_tile_rows: int = 1  # upper bound of `tile_rows`; 1: each row is a tile and the tile arrays are not read
    whole: bool = False  # the tiles are in order, none unused, and hold all rows; those of padding nothing else


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What a call computes, apart from its rows: where the layer's K and V lie, and how q.k becomes a weight. The last two
    are the scales of an fp8 pool, which holds K / key_scale and V / value_scale."""

    page_layers: int  # layers of a page
    layer_in_page: int
    num_kv_heads: int
    window: int | None = None  # a row sees so many tokens, itself among them; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    scale: float | None = None  # on q.k; None: 1 / sqrt(head_dim)
    key_scale: float | None = None
    value_scale: float | None = None

    def scores(self, head_dim: int) -> "Scores":
        """As the kernels take it."""
        return Scores(
            (head_dim**-0.5 if self.scale is None else self.scale) * (self.key_scale or 1.0),
            self.softcap or 0.0,
            NO_WINDOW if self.window is None else self.window,
            self.value_scale or 1.0,
        )


@dataclass(frozen=True, slots=True)
class PoolShape:
    """How the pool is cut, and by how many heads it is read; all compile-time constants of the kernels."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    page_layers: int

    @property
    def share(self) -> int:
        """Query heads on one K/V head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_dim(self) -> int:
        """The head size as `tl.dot` takes it."""
        return max(16, int(triton.next_power_of_2(self.head_dim)))

    def constants(self) -> dict[str, int]:
        """The keywords that both attention kernels take."""
        return {
            "HEADS": self.num_heads,
            "KV_HEADS": self.num_kv_heads,
            "SHARE": self.share,
            "HEAD_DIM": self.head_dim,
            "PADDED_DIM": self.padded_dim,
            "BLOCK_TOKENS": self.block_tokens,
            "PAGE_LAYERS": self.page_layers,
        }


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to q.k: times `scale`, then cap * tanh(. / cap) if capped; `value_scale` goes on the result."""

    scale: float
    softcap: float  # 0: none
    window: int  # NO_WINDOW: none
    value_scale: float

    @property
    def windowed(self) -> bool:
        """Whether a window hides anything."""
        return self.window < NO_WINDOW

    @property
    def factor(self) -> float:
        """q.k becomes an exponent of 2, or the argument of tanh."""
        return self.scale / self.softcap if self.softcap else self.scale * LOG2_E


@triton.jit
def load_keys_values(
    pool: "Any",
    table: "Any",  # pointer to the sequence's pages
    token: "Any",  # [BLOCK_N] positions
    seen: "Any",  # [BLOCK_N] those that may be read
    layer_in_page: "Any",
    kv_head: "Any",
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_LAYERS: tl.constexpr,
) -> Any:
    """K and V of `token`, each [BLOCK_N, PADDED_DIM]; zeros where nothing may be read."""
    page = tl.load(table + token // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
    slot = (page * (2 * PAGE_LAYERS) + layer_in_page) * BLOCK_TOKENS + token % BLOCK_TOKENS
    dim = tl.arange(0, PADDED_DIM)
    place = pool + slot[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + dim[None, :]
    inside = seen[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(place, mask=inside, other=0.0)
    value = tl.load(place + PAGE_LAYERS * BLOCK_TOKENS * KV_HEADS * HEAD_DIM, mask=inside, other=0.0)
    return key, value


@triton.jit
def softmax_step(
    query: "Any",  # [BLOCK_M, PADDED_DIM]
    key: "Any",  # [BLOCK_N, PADDED_DIM]
    value: "Any",
    visible: "Any",  # [BLOCK_M, BLOCK_N]
    accumulator: "Any",  # float32 [BLOCK_M, PADDED_DIM]
    largest: "Any",  # float32 [BLOCK_M], base 2
    total: "Any",
    factor: "Any",
    softcap: "Any",
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """One block of keys of the online softmax (Milakov & Gimelshein, arXiv 1805.02867), all sums in float32."""
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * factor
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x), right at both ends: 2 / inf is 0, and e^2x of a large negative x is 0
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * 2.8853900817779268))
        scores = tanh * (softcap * 1.4426950408889634)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(largest, tl.max(scores, axis=1))
    # a row that has seen nothing yet has -inf here, and -inf - -inf would be NaN
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(weight, axis=1)
    accumulator = accumulator * shrink[:, None]
    accumulator += tl.dot(weight.to(query.dtype), value.to(query.dtype), input_precision="ieee")
    return accumulator, highest, total


def reference(query: Tensor, pool: Tensor, batch: PagedRows, layer: AttentionLayer) -> Tensor:
    """The formula in float64, row by row, over the K/V that its table names: [rows, heads * head_dim]."""
    num_heads, head_dim = query.shape[1:]
    size = pool.shape[1]
    scale = head_dim**-0.5 if layer.scale is None else layer.scale
    out = torch.zeros(query.shape[0], num_heads * head_dim, dtype=torch.float64, device=query.device)
    for row, position in enumerate(batch.row_position.tolist()):
        if position < 0:
            continue
        tokens = torch.arange(0 if layer.window is None else max(0, position + 1 - layer.window), position + 1)
        pages = batch.tables[int(batch.row_sequence[row])].long().cpu()[tokens // size]
        rows = (pages * (2 * layer.page_layers) + layer.layer_in_page).to(pool.device)
        places = (tokens % size).to(pool.device)
        shape = (-1, layer.num_kv_heads, head_dim)
        keys = pool[rows, places].double().view(shape) * (layer.key_scale or 1.0)
        values = pool[rows + layer.page_layers, places].double().view(shape) * (layer.value_scale or 1.0)
        grouped = query[row].double().view(layer.num_kv_heads, -1, head_dim)
        scores = torch.einsum("kgd,ckd->kgc", grouped, keys) * scale
        if layer.softcap is not None:
            scores = (scores / layer.softcap).tanh() * layer.softcap
        out[row] = torch.einsum("kgc,ckd->kgd", scores.softmax(-1), values).flatten()
    return out
