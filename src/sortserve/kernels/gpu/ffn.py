"""The staircase gated FFN on a GPU: y = residual + down(act(gate x) * (up x)), with a width of its own for every row.

Sorted neurons make each width a prefix: gate and up keep rows [0, w), down keeps columns [0, w). Two kernels:

1. `gate_up_kernel`: a tile of rows x neurons computes both products over the hidden size, the activation (SwiGLU or
   GeGLU) and their product. A tile past its widest row returns at once. Of a row only neurons below its own width are
   stored; what lies beyond is never read.
2. `product` with `limits`: the down projection reads of every row its own prefix, and weights up to the widest one.

Widths are a device tensor, so one captured graph serves every mix of widths. Rows are sorted deepest and widest first,
so a tile's rows are alike and little is masked.

Bytes at width w: 3 * hidden * w of weights, once per tile of rows. FLOPs: 6 * rows * hidden * w.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect, output
from sortserve.kernels.gpu.product import check_weight, processors_of, product, splits_for, tiles_for

Activation = Literal["silu", "gelu_tanh"]
PERSISTENT_ROWS = 256
"""From here on a fixed number of programs walk the tiles, those of the same neurons one after the other (L2)."""


@dataclass(frozen=True, slots=True)
class GatedWeights:
    """One layer's FFN. Matrices in the model's dtype, or int8 / float8_e4m3fn with float32 scales per output channel.

    The scales of `down` are over its full reduction, so they are the same at every width.
    """

    gate: Tensor  # [width, hidden]
    up: Tensor  # [width, hidden]
    down: Tensor  # [hidden, width]
    gate_scale: Tensor | None = None  # [width]
    up_scale: Tensor | None = None  # [width]
    down_scale: Tensor | None = None  # [hidden]
    gate_bias: Tensor | None = None  # [width]
    up_bias: Tensor | None = None  # [width]
    down_bias: Tensor | None = None  # [hidden]

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases."""
        return sum(getattr(self, name).nbytes for name in self.__slots__ if getattr(self, name) is not None)


@triton.jit
def _activate(gate, up, GELU: tl.constexpr):
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up  # 0.5 (1 + tanh z) = sigmoid(2 z)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gate_up_tile(
    x_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, gate_bias_ptr, up_bias_ptr, widths_ptr, inner_ptr,
    row_tile, col_tile, num_rows, hidden, width,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """inner[rows, neurons] of one tile, for rows that are wide enough."""
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < num_rows
    widths = tl.minimum(tl.load(widths_ptr + rows, mask=row_ok, other=0), width)
    widest = tl.max(widths, 0)
    if col_tile * BLOCK_N < widest:
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        col_ok = cols < widest
        gate = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * hidden
        weight_rows = cols.to(tl.int64)[None, :] * hidden
        for start in range(0, hidden, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            k_ok = ks < hidden
            x = tl.load(x_rows + ks[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            w_ok = k_ok[:, None] & col_ok[None, :]
            g = tl.load(gate_ptr + weight_rows + ks[:, None], mask=w_ok, other=0.0).to(x.dtype)
            u = tl.load(up_ptr + weight_rows + ks[:, None], mask=w_ok, other=0.0).to(x.dtype)
            if EXACT:
                gate = tl.dot(x, g, gate, input_precision="ieee")
                up = tl.dot(x, u, up, input_precision="ieee")
            else:
                gate = tl.dot(x, g, gate)
                up = tl.dot(x, u, up)
        if HAS_SCALE:
            gate *= tl.load(gate_scale_ptr + cols, mask=col_ok, other=0.0)[None, :]
            up *= tl.load(up_scale_ptr + cols, mask=col_ok, other=0.0)[None, :]
        if HAS_BIAS:
            gate += tl.load(gate_bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
            up += tl.load(up_bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        inner = _activate(gate, up, GELU)
        ok = row_ok[:, None] & (cols[None, :] < widths[:, None])
        places = rows.to(tl.int64)[:, None] * width + cols[None, :]
        tl.store(inner_ptr + places, inner.to(inner_ptr.dtype.element_ty), mask=ok)


@triton.jit
def gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, gate_bias_ptr, up_bias_ptr, widths_ptr, inner_ptr,
    num_rows, hidden, width, row_tiles, num_tiles,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All tiles, row tiles fastest; as many programs as tiles for few rows, one per multiprocessor for many."""
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        gate_up_tile(
            x_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, gate_bias_ptr, up_bias_ptr, widths_ptr, inner_ptr,
            tile % row_tiles, tile // row_tiles, num_rows, hidden, width,
            HAS_SCALE, HAS_BIAS, GELU, EXACT, BLOCK_R, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def staircase_ffn(
    x: Tensor,
    weights: GatedWeights,
    widths: Tensor,
    residual: Tensor | None = None,
    *,
    activation: Activation = "silu",
    inner: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, hidden], widths int32 [rows] on the device -> [rows, hidden]; a row of width 0 is its residual (and the
    down projection's bias is left out there, since its FFN does not exist). Raises ValueError.

    `inner` [rows, width] is the space between the two kernels; it may hold anything. `out` may be `residual`.
    """
    rows, (width, hidden) = x.shape[0], weights.gate.shape
    _check(x, weights, widths, residual)
    inner = output("inner", inner, (rows, width), x)
    if rows == 0:
        return output("out", out, (rows, hidden), x)
    tiles = tiles_for(rows)
    row_tiles = triton.cdiv(rows, tiles.rows)
    num_tiles = row_tiles * triton.cdiv(width, tiles.out)
    programs = num_tiles if rows < PERSISTENT_ROWS else min(num_tiles, 2 * processors_of(x.device))
    gate_up_kernel[(programs,)](
        x, weights.gate, weights.up, weights.gate_scale, weights.up_scale, weights.gate_bias, weights.up_bias,
        widths, inner, rows, hidden, width, row_tiles, num_tiles,
        weights.gate_scale is not None, weights.gate_bias is not None, activation == "gelu_tanh",
        x.dtype == torch.float32, tiles.rows, tiles.out, tiles.inner, num_warps=tiles.warps,
    )  # fmt: skip
    bias = weights.down_bias
    if bias is None:
        return product(inner, weights.down, weights.down_scale, None, residual, widths, out)
    made = product(inner, weights.down, weights.down_scale, bias, None, widths)
    made = made * (widths > 0)[:, None]
    return torch.add(made, 0 if residual is None else residual, out=output("out", out, (rows, hidden), x))


def _check(x: Tensor, weights: GatedWeights, widths: Tensor, residual: Tensor | None) -> None:
    width, hidden = weights.gate.shape
    expect("x", x, (x.shape[0], hidden), x)
    expect("up", weights.up, (width, hidden), x)
    expect("down", weights.down, (hidden, width), x)
    expect("widths", widths, (x.shape[0],), x)
    if widths.dtype != torch.int32:
        raise ValueError(f"widths are {widths.dtype}, expected int32")
    for name in ("gate", "up", "down"):
        check_weight(name, getattr(weights, name), getattr(weights, f"{name}_scale"), x)
    if residual is not None:
        expect("residual", residual, tuple(x.shape), x)
    if (weights.gate_bias is None) != (weights.up_bias is None):
        raise ValueError("gate and up must both have a bias, or none of them")


def launches(rows: int, weights: GatedWeights, device: torch.device) -> int:
    """Kernels that one call starts: 2, or 3 where the down projection is split."""
    hidden, width = weights.down.shape
    tiles = tiles_for(rows)
    num_tiles = triton.cdiv(hidden, tiles.out) * triton.cdiv(rows, tiles.rows)
    return 2 + (splits_for(num_tiles, width, tiles.inner, processors_of(device)) > 1)


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
