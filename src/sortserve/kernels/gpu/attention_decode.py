"""Decode: one row of a sequence over its whole context, split over the context (split-K) so that all SMs work.

    split s of S:   m_s = max_t a_t,  l_s = sum_t 2^(a_t - m_s),  o_s = sum_t 2^(a_t - m_s) v_t / l_s,  L_s = m_s + log2 l_s
    merge:          out = sum_s 2^(L_s - L) o_s / sum_s 2^(L_s - L),   L = max_s L_s

with a_t = q.k_t scale log2(e) over the tokens t of the split. The query heads of one K/V head are the rows of one tile,
so K and V are read once for all of them. The context of each row is divided on the device, so a captured grid serves
every length up to `max_context`; splits that a short row does not need exit before they read K/V. The merge reads
the partial results in order: the same bits every time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.paged import PagedRows, PoolShape, Scores, load_keys_values, softmax_step
from sortserve.kernels.gpu.tiling import card_of

MAX_SPLITS = 128
TOKENS_PER_LONG_SPLIT = 2048  # at most so many tokens of a row are read by one program, however many rows there are
TOKENS_PER_FULL_SPLIT = 512  # where rows alone fill the device, a shorter piece only adds partial results


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How a call's contexts are divided: by grid sizes alone, never by what is on the device."""

    num_splits: int  # a power of two
    least_tokens: int  # a piece is at least so long

    @classmethod
    def of(cls, num_rows: int, num_kv_heads: int, max_context: int, num_multiprocessors: int) -> "SplitPlan":
        """Two programs per multiprocessor from `num_rows` rows, and no long piece."""
        programs, wanted = num_rows * num_kv_heads, 2 * num_multiprocessors
        splits = max(-(-wanted // programs), -(-max_context // TOKENS_PER_LONG_SPLIT))
        splits = min(splits, -(-max_context // 64), MAX_SPLITS)
        return cls(int(triton.next_power_of_2(splits)), 64 if programs < wanted else TOKENS_PER_FULL_SPLIT)


@dataclass(frozen=True, slots=True)
class AttentionScratch:
    """Partial results of the splits, one buffer for all calls and graphs that do not run at the same time."""

    partial: Tensor  # float32 [elements]
    log_sums: Tensor  # float32 [elements]

    @classmethod
    def allocate(
        cls, device: torch.device, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int
    ) -> "AttentionScratch":
        """Enough for every call with up to so many rows (or tiles) and so much context."""
        multiprocessors = card_of(device).processors
        counts = [
            rows * SplitPlan.of(rows, num_kv_heads, max_context, multiprocessors).num_splits
            for rows in range(1, max_rows + 1)
        ]
        pieces = max(counts) * num_heads
        partial = torch.empty(pieces * head_dim, dtype=torch.float32, device=device)
        return cls(partial, torch.empty(pieces, dtype=torch.float32, device=device))


@triton.jit(do_not_specialize=["layer_in_page", "window"])
def _decode_kernel(
    query: "Any",  # [rows, HEADS, HEAD_DIM]
    pool: "Any",
    tables: "Any",
    row_sequence: "Any",
    row_position: "Any",
    tile_first_row: "Any",
    tile_rows: "Any",
    partial: "Any",  # float32 [rows or tiles, HEADS, SPLITS, HEAD_DIM]
    log_sums: "Any",  # float32 [rows or tiles, HEADS, SPLITS]
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
    SPLITS: tl.constexpr,
    LEAST_TOKENS: tl.constexpr,
    TILED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = place
    if TILED:
        if tl.load(tile_rows + place) != 1:
            return
        row = tl.load(tile_first_row + place).to(tl.int64)
    position = tl.load(row_position + row)
    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    inside = (member < SHARE)[:, None] & (dim < HEAD_DIM)[None, :]
    head = kv_head * SHARE + member
    if position < 0:
        if SPLITS == 1 and not TILED:
            nothing = tl.zeros((BLOCK_M, PADDED_DIM), out.dtype.element_ty)
            tl.store(out + (row * HEADS + head[:, None]) * HEAD_DIM + dim[None, :], nothing, mask=inside)
        return
    first = tl.maximum(position + 1 - window, 0)
    start, piece = _piece(first, position, BLOCK_TOKENS, BLOCK_N, SPLITS, LEAST_TOKENS)
    begin = start + split * piece
    if begin > position:
        return
    stop = tl.minimum(begin + piece, position + 1)

    q = tl.load(query + row * query_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    table = tables + tl.load(row_sequence + row).to(tl.int64) * table_stride
    accumulator = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(begin, stop, BLOCK_N):
        token = block + tl.arange(0, BLOCK_N)
        seen = token < stop
        if WINDOW:
            seen = seen & (token >= first)
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
            q, key, value, seen[None, :], accumulator, largest, total, factor, softcap, SOFTCAP, True
        )
    result = accumulator / total[:, None] * value_scale
    if SPLITS == 1:
        target = out + (row * HEADS + head[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    else:
        part = (place * HEADS + head) * SPLITS + split
        tl.store(partial + part[:, None] * HEAD_DIM + dim[None, :], result, mask=inside)
        tl.store(log_sums + part, largest + tl.log2(total), mask=member < SHARE)


@triton.jit
def _piece(
    first: "Any",
    position: "Any",
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TOKENS: tl.constexpr,
) -> Any:
    """Where reading starts, at a page's first token, and tokens per split, whole blocks: as even as these allow."""
    start = first // BLOCK_TOKENS * BLOCK_TOKENS
    blocks = tl.cdiv(position + 1 - start, BLOCK_N)
    piece = tl.maximum(tl.cdiv(blocks, SPLITS), tl.cdiv(LEAST_TOKENS, BLOCK_N)) * BLOCK_N
    return start, piece


@triton.jit(do_not_specialize=["window"])
def _merge_kernel(
    partial: "Any",
    log_sums: "Any",
    row_position: "Any",
    tile_first_row: "Any",
    tile_rows: "Any",
    out: "Any",
    window: "Any",
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TOKENS: tl.constexpr,
    TILED: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = place
    if TILED:
        if tl.load(tile_rows + place) != 1:
            return
        row = tl.load(tile_first_row + place).to(tl.int64)
    position = tl.load(row_position + row)
    dim = tl.arange(0, PADDED_DIM)
    target = out + (row * HEADS + head) * HEAD_DIM + dim
    if position < 0:
        tl.store(target, tl.zeros((PADDED_DIM,), out.dtype.element_ty), mask=dim < HEAD_DIM)
        return
    first = tl.maximum(position + 1 - window, 0)
    start, piece = _piece(first, position, BLOCK_TOKENS, BLOCK_N, SPLITS, LEAST_TOKENS)
    used = tl.cdiv(position + 1 - start, piece)
    part = (place * HEADS + head) * SPLITS
    number = tl.arange(0, SPLITS)
    largest = tl.max(tl.load(log_sums + part + number, mask=number < used, other=float("-inf")), axis=0)
    accumulator = tl.zeros((PADDED_DIM,), tl.float32)
    total = 0.0
    for begin in range(0, used, BLOCK_S):
        which = begin + tl.arange(0, BLOCK_S)
        log_sum = tl.load(log_sums + part + which, mask=which < used, other=float("-inf"))
        weight = tl.exp2(log_sum - largest)
        inside = (which < used)[:, None] & (dim < HEAD_DIM)[None, :]
        pieces = tl.load(partial + (part + which)[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
        accumulator += tl.sum(pieces * weight[:, None], axis=0)
        total += tl.sum(weight, axis=0)
    tl.store(target, (accumulator / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def decode_config(padded_dim: int, element_bytes: int) -> tuple[int, int, int]:
    """(tokens per block, warps, stages): 32 KiB of K and V a stage and at most 64 KiB in flight, two or more programs
    on a multiprocessor. Three stages: page numbers, then K/V, then the products."""
    tokens = {16: 128, 32: 128, 64: 128, 128: 64, 256: 32}[padded_dim]
    return (tokens // 2 if element_bytes == 4 else tokens), 4, 3


def attend_decode(
    query: Tensor,
    pool: Tensor,
    batch: PagedRows,
    shape: PoolShape,
    scores: Scores,
    layer_in_page: int,
    out: Tensor,
    scratch: AttentionScratch | None,
) -> None:
    """The rows that are tiles of one row; all of them, and zeros for padding rows, where `batch.max_tile_rows` is 1."""
    tiled = batch.max_tile_rows > 1
    places = batch.tile_rows.shape[0] if tiled else query.shape[0]
    plan = SplitPlan.of(places, shape.num_kv_heads, batch.max_context, card_of(query.device).processors)
    pieces = places * shape.num_heads * plan.num_splits if plan.num_splits > 1 else 0
    if scratch is None:
        partial = torch.empty(pieces * shape.head_dim, dtype=torch.float32, device=query.device)
        scratch = AttentionScratch(partial, partial.new_empty(pieces))
    elif scratch.log_sums.numel() < pieces or scratch.partial.numel() < pieces * shape.head_dim:
        raise ValueError(f"the scratch holds {scratch.log_sums.numel()} partial results, this call makes {pieces}")
    tokens, warps, stages = decode_config(shape.padded_dim, query.element_size())
    splitting = {"SPLITS": plan.num_splits, "LEAST_TOKENS": plan.least_tokens, "BLOCK_N": tokens}
    _decode_kernel[(places, shape.num_kv_heads, plan.num_splits)](
        query,
        pool,
        batch.tables,
        batch.row_sequence,
        batch.row_position,
        batch.tile_first_row,
        batch.tile_rows,
        scratch.partial,
        scratch.log_sums,
        out,
        query.stride(0),
        batch.tables.stride(0),
        layer_in_page,
        scores.factor,
        scores.softcap,
        scores.window,
        scores.value_scale,
        **shape.constants(),
        **splitting,
        BLOCK_M=max(16, triton.next_power_of_2(shape.share)),
        TILED=tiled,
        WINDOW=scores.windowed,
        SOFTCAP=scores.softcap > 0,
        num_warps=warps,
        num_stages=stages,
    )
    if plan.num_splits == 1:
        return
    _merge_kernel[(places, shape.num_heads)](
        scratch.partial,
        scratch.log_sums,
        batch.row_position,
        batch.tile_first_row,
        batch.tile_rows,
        out,
        scores.window,
        HEADS=shape.num_heads,
        HEAD_DIM=shape.head_dim,
        PADDED_DIM=shape.padded_dim,
        BLOCK_TOKENS=shape.block_tokens,
        **splitting,
        BLOCK_S=min(16, plan.num_splits),
        TILED=tiled,
        num_warps=4,
    )
