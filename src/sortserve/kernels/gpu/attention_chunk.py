"""Prompt chunks and refills: tiles of several rows of one sequence over its cached prefix and over themselves.

    out_r = sum_t softmax_t(q_r.k_t scale) v_t   over tokens t <= position of row r (and within its window)

A program takes one tile and one K/V head; the tile's rows times the query heads of that head are the rows of its matrix
products, so K and V are read once for all of them. Tokens that every row of the tile sees need no mask; only the tile's
own last blocks do. Tiles of one row are left to the decode kernel.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.paged import PagedRows, PoolShape, Scores, load_keys_values, softmax_step


@triton.jit(do_not_specialize=["layer_in_page", "window"])
def _chunk_kernel(
    query: "Any",  # [rows, HEADS, HEAD_DIM]
    pool: "Any",
    tables: "Any",
    row_sequence: "Any",
    row_position: "Any",
    tile_first_row: "Any",
    tile_rows: "Any",
    out: "Any",  # [rows, HEADS * HEAD_DIM]
    query_stride: "Any",
    table_stride: "Any",
    layer_in_page: "Any",
    factor: "Any",
    softcap: "Any",
    window: "Any",
    value_scale: "Any",
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    # a sequence's last tile has the longest context: started first, it is not what all wait for in the end
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    rows = tl.load(tile_rows + tile)
    if rows < 2:
        return
    first_row = tl.load(tile_first_row + tile).to(tl.int64)
    first_position = tl.load(row_position + first_row)
    if first_position < 0:
        return
    member = tl.arange(0, BLOCK_M)  # row in the tile x query head of this K/V head
    dim = tl.arange(0, PADDED_DIM)
    inside = (member // SHARE < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    head = kv_head * SHARE + member % SHARE
    row = first_row + member // SHARE
    position = first_position + member // SHARE

    q = tl.load(query + row[:, None] * query_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    table = tables + tl.load(row_sequence + first_row).to(tl.int64) * table_stride
    accumulator = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.maximum(first_position + 1 - window, 0)  # the first token that some row sees
    masked = first // BLOCK_TOKENS * BLOCK_TOKENS  # where blocks with a mask begin
    if not WINDOW:
        masked = (first_position + 1) // BLOCK_N * BLOCK_N
        for begin in range(0, masked, BLOCK_N):
            token = begin + tl.arange(0, BLOCK_N)
            key, value = load_keys_values(
                pool,
                table,
                token,
                token < masked,
                layer_in_page,
                kv_head,
                HEAD_DIM,
                PADDED_DIM,
                KV_HEADS,
                BLOCK_TOKENS,
                PAGE_LAYERS,
            )
            accumulator, largest, total = softmax_step(
                q, key, value, token[None, :] < masked, accumulator, largest, total, factor, softcap, SOFTCAP, False
            )
    stop = first_position + rows
    for begin in range(masked, stop, BLOCK_N):
        token = begin + tl.arange(0, BLOCK_N)
        seen = token < stop
        visible = token[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (token >= first)
            visible = visible & (token[None, :] > position[:, None] - window)
        key, value = load_keys_values(
            pool,
            table,
            token,
            seen,
            layer_in_page,
            kv_head,
            HEAD_DIM,
            PADDED_DIM,
            KV_HEADS,
            BLOCK_TOKENS,
            PAGE_LAYERS,
        )
        accumulator, largest, total = softmax_step(
            q, key, value, visible, accumulator, largest, total, factor, softcap, SOFTCAP, True
        )
    # rows beyond the tile's may have seen nothing with a window; they are not stored
    result = accumulator / tl.where(total > 0, total, 1.0)[:, None] * value_scale
    target = out + (row[:, None] * HEADS + head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _zero_padding_kernel(row_position: "Any", out: "Any", WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    if tl.load(row_position + row) >= 0:
        return
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        tl.store(out + row * WIDTH + column, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < WIDTH)


def chunk_config(padded_dim: int, element_bytes: int) -> tuple[int, int, int, int]:
    """(rows x query heads of a tile, tokens per block, warps, stages). At head size 128 the queries take 32 KiB and a
    stage of K and V 32; float32, which only tests run, gets half the tokens."""
    members, tokens, warps, stages = {
        16: (128, 64, 8, 3),
        32: (128, 64, 8, 3),
        64: (128, 64, 8, 3),
        128: (128, 64, 8, 3),
        256: (64, 32, 8, 3),
    }[padded_dim]
    return (members, tokens // 2, warps, 2) if element_bytes == 4 else (members, tokens, warps, stages)


def rows_per_tile(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Into how long tiles a chunk should be cut: what fills the tile of the matrix products, at least 2."""
    members = chunk_config(PoolShape(num_heads, num_kv_heads, head_dim, 16, 1).padded_dim, 2)[0]
    return max(2, members // (num_heads // num_kv_heads))


def attend_chunks(
    query: Tensor,
    pool: Tensor,
    batch: PagedRows,
    shape: PoolShape,
    scores: Scores,
    layer_in_page: int,
    out: Tensor,
) -> None:
    """The rows of the tiles of several rows, and zeros for all padding rows."""
    full, tokens, warps, stages = chunk_config(shape.padded_dim, query.element_size())
    members = max(16, triton.next_power_of_2(batch.max_tile_rows * shape.share))
    _chunk_kernel[(batch.tile_rows.shape[0], shape.num_kv_heads)](
        query,
        pool,
        batch.tables,
        batch.row_sequence,
        batch.row_position,
        batch.tile_first_row,
        batch.tile_rows,
        out,
        query.stride(0),
        batch.tables.stride(0),
        layer_in_page,
        scores.factor,
        scores.softcap,
        scores.window,
        scores.value_scale,
        **shape.constants(),
        BLOCK_M=members,
        BLOCK_N=tokens,
        WINDOW=scores.windowed,
        SOFTCAP=scores.softcap > 0,
        num_warps=warps if members == full else 4,
        num_stages=stages,
    )
    _zero_padding_kernel[(query.shape[0],)](batch.row_position, out, WIDTH=out.shape[1], BLOCK=1024, num_warps=4)
