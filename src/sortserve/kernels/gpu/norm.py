"""RMSNorm on a GPU, with what stands before it: y = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

`gather`: rows are picked by an index list on the way (the rows that leave at an exit). `residual`: x + residual is
normed and also kept. One program a row; statistics and products in float32. Bytes: each row read and written once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect, output


@triton.jit
def norm_kernel(
    x_ptr: "Any",
    residual_ptr: "Any",
    index_ptr: "Any",
    weight_ptr: "Any",
    sum_ptr: "Any",
    out_ptr: "Any",
    size: "Any",
    eps: "Any",
    HAS_RESIDUAL: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_INDEX:
        source = tl.load(index_ptr + row).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    ok = cols < size
    x = tl.load(x_ptr + source * size + cols, mask=ok, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + source * size + cols, mask=ok, other=0.0)
        tl.store(sum_ptr + row * size + cols, x, mask=ok)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + cols, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + cols, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=ok)


def _launch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, index: Tensor | None, out: Tensor, total: Tensor
) -> None:
    size = x.shape[1]
    if out.shape[0]:
        block = triton.next_power_of_2(size)
        norm_kernel[(out.shape[0],)](
            x, residual, index, weight, total, out, size, eps,
            residual is not None, index is not None, block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x [rows, size] -> [rows, size]. Raises ValueError."""
    expect("x", x, (x.shape[0], x.shape[1]), x)
    expect("weight", weight, (x.shape[1],), x)
    out = output("out", out, tuple(x.shape), x)
    _launch(x, weight, eps, None, None, out, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x and residual [rows, size] -> (norm of their sum, the sum), both in x's dtype; the norm is of the sum as it is kept,
    rounded. Either of `out` may be x or residual, but not both the same. Raises ValueError."""
    expect("x", x, (x.shape[0], x.shape[1]), x)
    expect("residual", residual, tuple(x.shape), x)
    expect("weight", weight, (x.shape[1],), x)
    normed, total = (output("out", one, tuple(x.shape), x) for one in out or (None, None))
    _launch(x, weight, eps, residual, None, normed, total)
    return normed, total


def gather_norm(hidden: Tensor, index: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Rows `index` int64 [n] of hidden [rows, size], normed, [n, size]. The indices are not checked: that would wait for
    the device. Raises ValueError."""
    size = hidden.shape[1]
    expect("hidden", hidden, (hidden.shape[0], size), hidden)
    expect("index", index, (index.shape[0],), hidden)
    if index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype}, expected int64")
    expect("weight", weight, (size,), hidden)
    out = output("out", out, (index.shape[0], size), hidden)
    _launch(hidden, weight, eps, None, index, out, out)
    return out


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
