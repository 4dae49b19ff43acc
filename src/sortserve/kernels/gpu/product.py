"""Matrix products of few rows with weights of any format: y = (x W^T) * scale + bias + residual.

    x [rows, k] (model dtype), W [n, k] (model dtype, int8 or float8 e4m3), scale float32 [n] per output channel

Weights are dequantised in registers, so what is read from memory is their own bytes. `limits` cuts the reduction row by
row: of row r only x[r, :limits[r]] counts, which is how a down projection takes each row's own prefix of sorted
neurons. A tile reads weights up to its widest row and no further; a tile without work returns at once.

With few rows there are not enough tiles to keep all multiprocessors busy, so the reduction is split: parts go to a
float32 workspace and a second kernel adds them in order. No atomics: the same input gives the same bits.

Bytes: n * k of weights once per 16 to 64 rows, and rows * (k + n) of activations. FLOPs: 2 * rows * k * n.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect, output

WEIGHT_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Formats beside the model's dtype; they need a scale."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tile of a product: rows, output channels and reduction of one step, and warps."""

    rows: int
    out: int
    inner: int
    warps: int


def tiles_for(num_rows: int) -> Tiles:
    """One table for all shapes, so that graphs captured at start and eager steps run the same kernel. At 16 rows a step
    reads 64 x 128 weights; more rows reuse them."""
    if num_rows <= 16:
        return Tiles(16, 64, 128, 4)
    if num_rows <= 32:
        return Tiles(32, 64, 128, 4)
    if num_rows <= 64:
        return Tiles(64, 64, 64, 4)
    return Tiles(64, 128, 64, 8)


def splits_for(num_tiles: int, k: int, inner: int, processors: int) -> int:
    """Parts of the reduction: enough tiles for two per multiprocessor, at least four steps each, 16 at most."""
    wanted = max(1, 2 * processors // max(1, num_tiles))
    return max(1, min(wanted, k // (4 * inner), 16))


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, so that tests meet splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def product_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, limits_ptr, out_ptr,
    num_rows, n, k, k_per_split, x_stride, w_stride,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_LIMITS: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_R, BLOCK_N] over one part of the reduction."""
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    row_ok, col_ok = rows < num_rows, cols < n
    begin = part * k_per_split
    end = tl.minimum(begin + k_per_split, k)
    if HAS_LIMITS:
        limits = tl.load(limits_ptr + rows, mask=row_ok, other=0)
        end = tl.minimum(end, tl.max(limits, 0))
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + cols.to(tl.int64)[None, :] * w_stride
    for start in range(begin, end, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        k_ok = ks < end
        x_ok = row_ok[:, None] & k_ok[None, :]
        if HAS_LIMITS:
            x_ok &= ks[None, :] < limits[:, None]
        x = tl.load(x_rows + ks[None, :], mask=x_ok, other=0.0)
        w = tl.load(w_rows + ks[:, None], mask=k_ok[:, None] & col_ok[None, :], other=0.0)
        if EXACT:
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.to(x.dtype), acc)
    ok = row_ok[:, None] & col_ok[None, :]
    places = rows.to(tl.int64)[:, None] * n + cols[None, :]
    if SPLIT:
        tl.store(out_ptr + part.to(tl.int64) * num_rows * n + places, acc, mask=ok)
    else:
        if HAS_SCALE:
            acc *= tl.load(scale_ptr + cols, mask=col_ok, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + places, mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def add_parts_kernel(
    parts_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, num_rows, n, splits,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of all parts of one piece of a row, in order, and what comes after it."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < n
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(splits):
        acc += tl.load(parts_ptr + (part * num_rows + row) * n + cols, mask=ok, other=0.0)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + cols, mask=ok, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + row * n + cols, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + cols, acc.to(out_ptr.dtype.element_ty), mask=ok)


def check_weight(name: str, weight: Tensor, scale: Tensor | None, x: Tensor) -> None:
    """A weight [n, k] in x's dtype, or in a narrow one with a float32 scale [n]. Raises ValueError."""
    expect(name, weight, tuple(weight.shape), x)
    if weight.dtype in WEIGHT_DTYPES:
        if scale is None:
            raise ValueError(f"{name} is {weight.dtype} and has no scale")
        expect(f"the scale of {name}", scale, (weight.shape[0],), x)
        if scale.dtype != torch.float32:
            raise ValueError(f"the scale of {name} is {scale.dtype}, expected float32")
    elif weight.dtype != x.dtype:
        raise ValueError(f"{name} is {weight.dtype}, x is {x.dtype}: expected the same, int8 or float8_e4m3fn")


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    limits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, k] -> [rows, n]; `limits` int32 [rows] on the device. `out` may be `residual`. Raises ValueError.

    The workspace of a split comes from PyTorch's allocator, which a captured graph keeps for itself.
    """
    rows, (n, k) = x.shape[0], weight.shape
    expect("x", x, (rows, k), x)
    check_weight("weight", weight, scale, x)
    for name, tensor, shape in (("bias", bias, (n,)), ("residual", residual, (rows, n)), ("limits", limits, (rows,))):
        if tensor is not None:
            expect(name, tensor, shape, x)
    out = output("out", out, (rows, n), x)
    if rows == 0:
        return out
    tiles = tiles_for(rows)
    grid = (triton.cdiv(n, tiles.out), triton.cdiv(rows, tiles.rows))
    splits = splits_for(grid[0] * grid[1], k, tiles.inner, processors_of(x.device))
    per_split = triton.cdiv(triton.cdiv(k, splits), tiles.inner) * tiles.inner
    splits = triton.cdiv(k, per_split)
    parts = x.new_empty((splits, rows, n), dtype=torch.float32) if splits > 1 else out
    after = (scale, bias, residual)
    has = (scale is not None, bias is not None, residual is not None)
    product_kernel[(*grid, splits)](
        x, weight, *after, limits, parts,
        rows, n, k, per_split, x.stride(0), weight.stride(0),
        *has, limits is not None, splits > 1, x.dtype == torch.float32, tiles.rows, tiles.out, tiles.inner,
        num_warps=tiles.warps,
    )  # fmt: skip
    if splits > 1:
        block = min(1024, triton.next_power_of_2(n))
        add_parts_kernel[(rows, triton.cdiv(n, block))](parts, *after, out, rows, n, splits, *has, block)
    return out


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    limits: Tensor | None = None,
) -> Tensor:
    """The formula in float64."""
    wide = x.double()
    if limits is not None:
        wide = wide * (torch.arange(x.shape[1], device=x.device)[None] < limits[:, None])
    y = wide @ weight.double().T
    for factor in () if scale is None else (scale,):
        y = y * factor.double()
    for term in (bias, residual):
        y = y if term is None else y + term.double()
    return y
