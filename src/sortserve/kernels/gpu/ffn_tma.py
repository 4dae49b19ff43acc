"""The staircase FFN of many rows with tensor descriptors: tiles come by the tensor memory accelerator (TMA) of Hopper and
newer cards, which one thread starts, instead of by addresses that every thread works out and masks.

    inner = act(x gate^T) * (x up^T), zero beyond a row's width;  y = residual + inner down^T

The same tiles, the same order of sums and the same contract as the kernels of ffn.py and product.py: `inner` is stored up
to the next multiple of COVER past a tile's widest row and read no further. What lies beyond a matrix is zero without a
mask; what lies beyond a row's width is a number of the matrix, and is left out by the mask on `inner`. A fixed number of
programs walk the tiles, so the first loads of a tile run beside the end of the one before.

Descriptors are made on the host, from sizes alone (16-byte strides, a 16-byte base): a captured graph may hold them.
Weights in the model's dtype only: narrow ones have to pass through registers, and TMA would gain nothing there.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sortserve.kernels.gpu.gated import Activation, GatedWeights, gated_tile, tile_place, tile_widths
from sortserve.kernels.gpu.product import finish, reach
from sortserve.kernels.gpu.tiling import COVER, GROUP_ROWS, Tiles, programs_for

LEAST_CAPABILITY = (9, 0)


@lru_cache(maxsize=16)
def has_tma(device: torch.device) -> bool:
    """Whether the card has it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def fits_tma(x: Tensor, inner: Tensor, weights: GatedWeights) -> bool:
    """Whether all matrices are in x's dtype, and their rows begin at multiples of 16 bytes."""
    matrices = (x, inner, weights.gate, weights.up, weights.down)
    return all(
        matrix.dtype == x.dtype and matrix.data_ptr() % 16 == 0 and matrix.shape[1] * matrix.itemsize % 16 == 0
        for matrix in matrices
    )


@triton.jit
def gate_up_tma_kernel(
    x: "Any",  # descriptor [rows, hidden], blocks [BLOCK_R, BLOCK_K]
    gate: "Any",  # descriptors [width, hidden], blocks [BLOCK_N, BLOCK_K]
    up: "Any",
    inner: "Any",  # descriptor [rows, width], blocks [BLOCK_R, BLOCK_N]
    gate_bias_ptr: "Any",
    up_bias_ptr: "Any",
    widths_ptr: "Any",
    num_rows: "Any",
    hidden: "Any",
    width: "Any",
    row_tiles: "Any",
    col_tiles: "Any",
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    COVER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    for tile in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = tile_place(tile, row_tiles, col_tiles, GROUP)
        row, col = row_tile * BLOCK_R, col_tile * BLOCK_N
        rows = row + tl.arange(0, BLOCK_R)
        widths, widest = tile_widths(widths_ptr, rows, num_rows, width)
        if col < tl.cdiv(widest, COVER) * COVER:
            cols = col + tl.arange(0, BLOCK_N)
            gates = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            ups = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            if col < widest:
                for k in range(0, hidden, BLOCK_K):
                    part = x.load([row, k])
                    gates = tl.dot(part, tl.trans(gate.load([col, k])), gates, input_precision="ieee")
                    ups = tl.dot(part, tl.trans(up.load([col, k])), ups, input_precision="ieee")
            made = gated_tile(gates, ups, gate_bias_ptr, up_bias_ptr, cols, widths, width, HAS_BIAS, GELU)
            inner.store([row, col], made.to(inner.dtype))


@triton.jit
def down_tma_kernel(
    inner: "Any",  # descriptor [rows, width], blocks [BLOCK_R, BLOCK_K]
    down: "Any",  # descriptor [hidden, width], blocks [BLOCK_N, BLOCK_K]
    bias_ptr: "Any",
    residual_ptr: "Any",
    widths_ptr: "Any",
    out_ptr: "Any",
    num_rows: "Any",
    hidden: "Any",
    width: "Any",
    row_tiles: "Any",
    col_tiles: "Any",
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    for tile in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = tile_place(tile, row_tiles, col_tiles, GROUP)
        row, col = row_tile * BLOCK_R, col_tile * BLOCK_N
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k in range(0, reach(widths_ptr, row_tile, num_rows, width, True, BLOCK_R), BLOCK_K):
            acc = tl.dot(inner.load([row, k]), tl.trans(down.load([col, k])), acc, input_precision="ieee")
        rows, cols = row + tl.arange(0, BLOCK_R), col + tl.arange(0, BLOCK_N)
        row_ok, col_ok = rows < num_rows, cols < hidden
        ok = row_ok[:, None] & col_ok[None, :]
        places = rows.to(tl.int64)[:, None] * hidden + cols[None, :]
        widths = tl.load(widths_ptr + rows, mask=row_ok, other=0)
        acc = finish(
            acc, widths, None, bias_ptr, residual_ptr, places, cols, ok, col_ok, False, HAS_BIAS, HAS_RESIDUAL, True
        )
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=ok)


def gate_up_by_tma(
    x: Tensor, weights: GatedWeights, widths: Tensor, activation: Activation, inner: Tensor, tiles: Tiles
) -> None:
    """Fill `inner` [rows, width]; arguments are `staircase_ffn`'s, checked, and `fits_tma` must hold."""
    rows, (width, hidden) = x.shape[0], weights.gate.shape
    row_tiles, col_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.out)
    gate_up_tma_kernel[(programs_for(rows, row_tiles * col_tiles, x.device),)](
        _tiled(x, tiles.rows, tiles.inner),
        _tiled(weights.gate, tiles.out, tiles.inner),
        _tiled(weights.up, tiles.out, tiles.inner),
        _tiled(inner, tiles.rows, tiles.out),
        weights.gate_bias, weights.up_bias, widths, rows, hidden, width, row_tiles, col_tiles,
        weights.gate_bias is not None, activation == "gelu_tanh",
        COVER, GROUP_ROWS, tiles.rows, tiles.out, tiles.inner,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def down_by_tma(
    inner: Tensor, weights: GatedWeights, widths: Tensor, residual: Tensor | None, out: Tensor, tiles: Tiles
) -> Tensor:
    """`product` of `inner` and down with `widths` as limits, not split."""
    rows, (hidden, width) = inner.shape[0], weights.down.shape
    row_tiles, col_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(hidden, tiles.out)
    down_tma_kernel[(programs_for(rows, row_tiles * col_tiles, inner.device),)](
        _tiled(inner, tiles.rows, tiles.inner),
        _tiled(weights.down, tiles.out, tiles.inner),
        weights.down_bias, residual, widths, out, rows, hidden, width, row_tiles, col_tiles,
        weights.down_bias is not None, residual is not None,
        GROUP_ROWS, tiles.rows, tiles.out, tiles.inner,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _tiled(matrix: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
