"""The staircase gated FFN on a GPU: y = residual + down(act(gate x) * (up x)), with a width of its own for every row.

Sorted neurons make each width a prefix: gate and up keep rows [0, w), down keeps columns [0, w). Two kernels:

1. `gate_up_kernel`: a tile of rows x neurons computes both products over the hidden size, the activation (SwiGLU or
   GeGLU) and their product. Activations beyond a row's own width are stored as zeros, up to the next multiple of COVER
   past the tile's widest row; a tile past that returns at once, and nothing there is ever read.
2. `product` with `limits`: the down projection reads neurons up to the widest row of a tile. With few rows its reduction
   is split and a third kernel adds the parts in order; gate and up get narrow tiles instead, which fill the card without
   a sum.

From 65 rows on, where the card has a tensor memory accelerator, the kernels of ffn_tma.py do the same.

Widths are a device tensor, so one captured graph serves every mix of widths. Rows are sorted deepest and widest first,
so a tile's rows are alike and little is masked.

Bytes at width w: 3 * hidden * w of weights, once per tile of rows. FLOPs: 6 * rows * hidden * w.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect, output
from sortserve.kernels.gpu.ffn_tma import down_by_tma, fits_tma, gate_up_by_tma, has_tma
from sortserve.kernels.gpu.gated import Activation, GatedWeights, gated_tile, tile_place, tile_widths
from sortserve.kernels.gpu.product import check_weight, product
from sortserve.kernels.gpu.tiling import COVER, GROUP_ROWS, Tiles, gate_up_tiles, plan, programs_for

__all__ = ["Activation", "FfnScratch", "GatedWeights", "reference", "staircase_ffn"]


@triton.jit
def _gate_up_tile(
    x_ptr: "Any",
    gate_ptr: "Any",
    up_ptr: "Any",
    gate_scale_ptr: "Any",
    up_scale_ptr: "Any",
    gate_bias_ptr: "Any",
    up_bias_ptr: "Any",
    widths_ptr: "Any",
    inner_ptr: "Any",
    row_tile: "Any",
    col_tile: "Any",
    num_rows: "Any",
    hidden: "Any",
    width: "Any",
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    COVER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """inner[rows, neurons] of one tile, zero where a row is not wide enough."""
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < num_rows
    widths, widest = tile_widths(widths_ptr, rows, num_rows, width)
    first = col_tile * BLOCK_N
    if first < tl.cdiv(widest, COVER) * COVER:
        cols = first + tl.arange(0, BLOCK_N)
        gate = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        if first < widest:
            col_ok = cols < widest
            x_rows = x_ptr + rows.to(tl.int64)[:, None] * hidden
            weight_rows = cols.to(tl.int64)[None, :] * hidden
            for start in range(0, hidden, BLOCK_K):
                ks = start + tl.arange(0, BLOCK_K)
                k_ok = ks < hidden
                x = tl.load(x_rows + ks[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
                w_ok = k_ok[:, None] & col_ok[None, :]
                g = tl.load(gate_ptr + weight_rows + ks[:, None], mask=w_ok, other=0.0).to(x.dtype)
                u = tl.load(up_ptr + weight_rows + ks[:, None], mask=w_ok, other=0.0).to(x.dtype)
                gate = tl.dot(x, g, gate, input_precision="ieee")
                up = tl.dot(x, u, up, input_precision="ieee")
            if HAS_SCALE:
                gate *= tl.load(gate_scale_ptr + cols, mask=col_ok, other=0.0)[None, :]
                up *= tl.load(up_scale_ptr + cols, mask=col_ok, other=0.0)[None, :]
        inner = gated_tile(gate, up, gate_bias_ptr, up_bias_ptr, cols, widths, width, HAS_BIAS, GELU)
        places = rows.to(tl.int64)[:, None] * width + cols[None, :]
        ok = row_ok[:, None] & (cols < width)[None, :]
        tl.store(inner_ptr + places, inner.to(inner_ptr.dtype.element_ty), mask=ok)


@triton.jit
def gate_up_kernel(
    x_ptr: "Any",
    gate_ptr: "Any",
    up_ptr: "Any",
    gate_scale_ptr: "Any",
    up_scale_ptr: "Any",
    gate_bias_ptr: "Any",
    up_bias_ptr: "Any",
    widths_ptr: "Any",
    inner_ptr: "Any",
    num_rows: "Any",
    hidden: "Any",
    width: "Any",
    row_tiles: "Any",
    col_tiles: "Any",
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    COVER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """All tiles, in groups of row tiles; as many programs as tiles for few rows, a fixed number for many."""
    for tile in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = tile_place(tile, row_tiles, col_tiles, GROUP)
        _gate_up_tile(
            x_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, gate_bias_ptr, up_bias_ptr, widths_ptr, inner_ptr,
            row_tile, col_tile, num_rows, hidden, width,
            HAS_SCALE, HAS_BIAS, GELU, COVER, BLOCK_R, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FfnScratch:
    """Space of one call, may hold anything: `inner` (model dtype, rows * width elements) between the two kernels, `parts`
    (float32, splits * rows * hidden elements) for the split."""

    inner: Tensor
    parts: Tensor

    @classmethod
    def for_rows(cls, max_rows: int, weights: GatedWeights, x: Tensor) -> "FfnScratch":
        """Enough for every number of rows up to `max_rows`, on the device and in the dtype of x."""
        hidden, width = weights.down.shape
        needed = [rows * plan(rows, x, weights.down)[1] for rows in range(1, max_rows + 1)]
        parts = max(needed, default=0) * hidden
        return cls(x.new_empty(max_rows * width), x.new_empty(parts, dtype=torch.float32))


def staircase_ffn(
    x: Tensor,
    weights: GatedWeights,
    widths: Tensor,
    residual: Tensor | None = None,
    *,
    activation: Activation = "silu",
    scratch: FfnScratch | None = None,
    out: Tensor | None = None,
    tma: bool | None = None,
) -> Tensor:
    """x [rows, hidden], widths int32 [rows] on the device -> [rows, hidden]; a row of width 0 is its residual (and the
    down projection's bias is left out there, since its FFN does not exist). Raises ValueError.

    `out` may be `residual`; `scratch` is overwritten, and comes from PyTorch's allocator where it is not given. `tma`: with
    tensor descriptors, where sizes and formats allow; None: where the card has them.
    """
    rows, (width, hidden) = x.shape[0], weights.gate.shape
    _check(x, weights, widths, residual, activation)
    if scratch is not None and scratch.inner.numel() < rows * width:
        raise ValueError(f"scratch.inner has {scratch.inner.numel()} elements, expected {rows * width}")
    inner = None if scratch is None else scratch.inner.view(-1)[: rows * width].view(rows, width)
    inner = output("scratch.inner", inner, (rows, width), x)
    if rows == 0:
        return output("out", out, (rows, hidden), x)
    tiles = gate_up_tiles(rows, x, weights.gate)
    by_tma = (has_tma(x.device) if tma is None else tma) and rows > 64 and fits_tma(x, inner, weights)
    if by_tma:
        gate_up_by_tma(x, weights, widths, activation, inner, tiles)
    else:
        _gate_up(x, weights, widths, activation, inner, tiles)
    down_tiles, splits = plan(rows, x, weights.down)
    if by_tma and splits == 1:
        return down_by_tma(inner, weights, widths, residual, output("out", out, (rows, hidden), x), down_tiles)
    parts = None if scratch is None else scratch.parts
    return product(inner, weights.down, weights.down_scale, weights.down_bias, residual, widths, out, parts)


def _gate_up(
    x: Tensor, weights: GatedWeights, widths: Tensor, activation: Activation, inner: Tensor, tiles: Tiles
) -> None:
    rows, (width, hidden) = x.shape[0], weights.gate.shape
    row_tiles, col_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.out)
    gate_up_kernel[(programs_for(rows, row_tiles * col_tiles, x.device),)](
        x, weights.gate, weights.up, weights.gate_scale, weights.up_scale, weights.gate_bias, weights.up_bias,
        widths, inner, rows, hidden, width, row_tiles, col_tiles,
        weights.gate_scale is not None, weights.gate_bias is not None, activation == "gelu_tanh",
        COVER, GROUP_ROWS, tiles.rows, tiles.out, tiles.inner,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _check(x: Tensor, weights: GatedWeights, widths: Tensor, residual: Tensor | None, activation: str) -> None:
    width, hidden = weights.gate.shape
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}, expected 'silu' or 'gelu_tanh'")
    expect("x", x, (x.shape[0], hidden), x)
    expect("up", weights.up, (width, hidden), x)
    expect("down", weights.down, (hidden, width), x)
    expect("widths", widths, (x.shape[0],), x)
    if widths.dtype != torch.int32:
        raise ValueError(f"widths are {widths.dtype}, expected int32")
    for name in ("gate", "up", "down"):
        check_weight(name, getattr(weights, name), getattr(weights, f"{name}_scale"), x)
    for name, tensor, size in (("gate", weights.gate_bias, width), ("up", weights.up_bias, width)):
        if tensor is not None:
            expect(f"the bias of {name}", tensor, (size,), x)
    if residual is not None:
        expect("residual", residual, tuple(x.shape), x)
    if (weights.gate_scale is None) != (weights.up_scale is None):
        raise ValueError("gate and up must both have a scale, or none of them")
    if (weights.gate_bias is None) != (weights.up_bias is None):
        raise ValueError("gate and up must both have a bias, or none of them")


def launches(rows: int, x: Tensor, weights: GatedWeights) -> int:
    """Kernels that one call starts: 2, or 3 where the down projection is split."""
    return 2 + (plan(rows, x, weights.down)[1] > 1)


def reference(
    x: Tensor, weights: GatedWeights, widths: Tensor, residual: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    """The formula in float64, row by row, from the weights that the scales stand for, [rows, hidden]."""

    def wide(weight: Tensor, scale: Tensor | None) -> Tensor:
        return weight.double() if scale is None else weight.double() * scale.double()[:, None]

    def plus(y: Tensor, bias: Tensor | None, size: int) -> Tensor:
        return y if bias is None else y + bias.double()[:size]

    gate, up = wide(weights.gate, weights.gate_scale), wide(weights.up, weights.up_scale)
    down = wide(weights.down, weights.down_scale)
    rows = []
    for row, w in enumerate(widths.tolist()):
        one = x[row].double()
        g, u = plus(gate[:w] @ one, weights.gate_bias, w), plus(up[:w] @ one, weights.up_bias, w)
        act = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
        made = down[:, :w] @ (act * u)
        made = plus(made, weights.down_bias, down.shape[0]) if w else made
        rows.append(made if residual is None else made + residual[row].double())
    return torch.stack(rows)
