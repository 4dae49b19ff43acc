"""Matrix products of few rows with weights of any format: y = (x W^T) * scale + bias + residual.

    x [rows, k] (model dtype), W [n, k] (model dtype, int8 or float8 e4m3), scale float32 [n] per output channel

Weights are dequantised in registers, so what is read from memory is their own bytes. `limits` cuts the reduction row by
row, which is how a down projection takes each row's own prefix of sorted neurons: x[r, limits[r]:] must be zero up to the
next multiple of COVER past the widest row of r's tile, and is not read beyond. (A mask per element instead would break the
16-byte loads: it ends where the compiler cannot know.) A tile reads weights up to its widest row, rounded up to a
step; a tile without work stores nothing but its residual.

With few rows there are not enough tiles to keep all multiprocessors busy, so the reduction is split: parts go to a
float32 workspace and a second kernel adds them in order. What is split is what the tile's widest row needs, so half the
width is half the work for everyone. No atomics: the same input gives the same bits.

Bytes: n * k of weights once per 16 to 128 rows, and rows * (k + n) of activations. FLOPs: 2 * rows * k * n.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect, output
from sortserve.kernels.gpu.tiling import plan

WEIGHT_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Formats beside the model's dtype; they need a scale."""


@triton.jit
def reach(
    limits_ptr: "Any",
    row_tile: "Any",
    num_rows: "Any",
    k: "Any",
    HAS_LIMITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> "Any":
    """How much of the reduction the widest row of a tile needs."""
    end = k
    if HAS_LIMITS:
        rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        end = tl.minimum(k, tl.maximum(tl.max(tl.load(limits_ptr + rows, mask=rows < num_rows, other=0), 0), 0))
    return end


@triton.jit
def _per_part(
    end: "Any",
    splits: "Any",
    BLOCK_K: tl.constexpr,
) -> "Any":
    """Size of one part of a reduction, whole steps."""
    return tl.cdiv(tl.cdiv(end, BLOCK_K), splits) * BLOCK_K


@triton.jit
def finish(
    acc: "Any",
    row_limits: "Any",
    scale_ptr: "Any",
    bias_ptr: "Any",
    residual_ptr: "Any",
    places: "Any",
    cols: "Any",
    ok: "Any",
    col_ok: "Any",
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
) -> "Any":
    """(sum) * scale + bias + residual for [rows, n] places; a row of limit 0 has no product and so no bias."""
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + cols, mask=col_ok, other=0.0)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if HAS_LIMITS:
            acc += tl.where(row_limits[:, None] > 0, bias, 0.0)
        else:
            acc += bias
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + places, mask=ok, other=0.0).to(tl.float32)
    return acc


@triton.jit
def product_kernel(
    x_ptr: "Any",
    w_ptr: "Any",
    scale_ptr: "Any",
    bias_ptr: "Any",
    residual_ptr: "Any",
    limits_ptr: "Any",
    out_ptr: "Any",
    num_rows: "Any",
    n: "Any",
    k: "Any",
    splits: "Any",
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile [BLOCK_R, BLOCK_N] over one part of the reduction."""
    row_tile, part = tl.program_id(1), tl.program_id(2)
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = rows < num_rows, cols < n
    begin, end = 0, reach(limits_ptr, row_tile, num_rows, k, HAS_LIMITS, BLOCK_R)
    if SPLIT:
        size = _per_part(end, splits, BLOCK_K)
        begin = part * size
        end = tl.minimum(end, begin + size)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * k
    w_rows = w_ptr + cols.to(tl.int64)[None, :] * k
    for start in range(begin, end, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        k_ok = ks < k
        x = tl.load(x_rows + ks[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(w_rows + ks[:, None], mask=k_ok[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
    ok = row_ok[:, None] & col_ok[None, :]
    places = rows.to(tl.int64)[:, None] * n + cols[None, :]
    if SPLIT:
        if begin < end:
            tl.store(out_ptr + part.to(tl.int64) * num_rows * n + places, acc, mask=ok)
    else:
        row_limits = rows
        if HAS_LIMITS:
            row_limits = tl.load(limits_ptr + rows, mask=row_ok, other=0)
        acc = finish(
            acc, row_limits, scale_ptr, bias_ptr, residual_ptr, places, cols, ok, col_ok,
            HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, HAS_LIMITS,
        )  # fmt: skip
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def add_parts_kernel(
    parts_ptr: "Any",
    scale_ptr: "Any",
    bias_ptr: "Any",
    residual_ptr: "Any",
    limits_ptr: "Any",
    out_ptr: "Any",
    num_rows: "Any",
    n: "Any",
    k: "Any",
    splits: "Any",
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The sum of the parts that were stored of one piece of a row, in order, and what comes after it."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < n
    end = reach(limits_ptr, row // BLOCK_R, num_rows, k, HAS_LIMITS, BLOCK_R)
    used = tl.cdiv(end, tl.maximum(_per_part(end, splits, BLOCK_K), 1))
    acc = tl.zeros((1, BLOCK), tl.float32)
    places = row.to(tl.int64) * n + cols[None, :]
    for part in range(used):
        acc += tl.load(parts_ptr + part * num_rows * n + places, mask=ok[None, :], other=0.0)
    row_limits = row + tl.zeros((1,), tl.int32)
    if HAS_LIMITS:
        row_limits = tl.load(limits_ptr + row_limits)
    acc = finish(
        acc, row_limits, scale_ptr, bias_ptr, residual_ptr, places, cols, ok[None, :], ok,
        HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, HAS_LIMITS,
    )  # fmt: skip
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=ok[None, :])


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
    parts: Tensor | None = None,
) -> Tensor:
    """x [rows, k] -> [rows, n]; `limits` int32 [rows] on the device. `out` may be `residual`. Raises ValueError.

    `parts`: float32 workspace of at least splits * rows * n; else it comes from PyTorch's allocator, which a captured
    graph keeps for itself.
    """
    rows, (n, k) = x.shape[0], weight.shape
    expect("x", x, (rows, k), x)
    check_weight("weight", weight, scale, x)
    for name, tensor, shape in (("bias", bias, (n,)), ("residual", residual, (rows, n)), ("limits", limits, (rows,))):
        if tensor is not None:
            expect(name, tensor, shape, x)
    if limits is not None and limits.dtype != torch.int32:
        raise ValueError(f"limits are {limits.dtype}, expected int32")
    out = output("out", out, (rows, n), x)
    if rows == 0 or n == 0:
        return out
    tiles, splits = plan(rows, x, weight)
    target = _workspace(parts, splits * rows * n, x) if splits > 1 else out
    after = (scale, bias, residual, limits)
    has = (scale is not None, bias is not None, residual is not None, limits is not None)
    product_kernel[(triton.cdiv(n, tiles.out), triton.cdiv(rows, tiles.rows), splits)](
        x, weight, *after, target, rows, n, k, splits,
        *has, splits > 1, tiles.rows, tiles.out, tiles.inner,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        block = min(1024, triton.next_power_of_2(n))
        add_parts_kernel[(rows, triton.cdiv(n, block))](
            target, *after, out, rows, n, k, splits, *has, tiles.rows, tiles.inner, block
        )
    return out


def _workspace(parts: Tensor | None, size: int, x: Tensor) -> Tensor:
    if parts is None:
        return x.new_empty(size, dtype=torch.float32)
    if parts.numel() < size or parts.dtype != torch.float32 or parts.device != x.device or not parts.is_contiguous():
        raise ValueError(
            f"parts is {parts.dtype} {tuple(parts.shape)} on {parts.device}, expected {size} contiguous float32"
        )
    return parts


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
        wide = wide.masked_fill(torch.arange(x.shape[1], device=x.device)[None] >= limits[:, None], 0.0)
    y = wide @ weight.double().T
    if scale is not None:
        y = y * scale.double()
    if bias is not None:
        y = y + (bias.double() if limits is None else bias.double() * (limits > 0)[:, None])
    return y if residual is None else y + residual.double()
