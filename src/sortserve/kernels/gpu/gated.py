"""What the staircase FFN's kernels share: one layer's weights, the walk over tiles, and a tile's gated activations."""

from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


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
def tile_place(
    tile: "Any",
    row_tiles: "Any",
    col_tiles: "Any",
    GROUP: tl.constexpr,
) -> "Any":
    """(row tile, column tile) of the tile-th step of the walk, in groups of row tiles."""
    first = tile // (GROUP * col_tiles) * GROUP
    in_group = tl.minimum(row_tiles - first, GROUP)
    place = tile % (GROUP * col_tiles)
    return first + place % in_group, place // in_group


@triton.jit
def tile_widths(widths_ptr: "Any", rows: "Any", num_rows: "Any", width: "Any") -> "Any":
    """Widths of a tile's rows, and the widest of them."""
    widths = tl.minimum(tl.load(widths_ptr + rows, mask=rows < num_rows, other=0), width)
    return widths, tl.maximum(tl.max(widths, 0), 0)


@triton.jit
def gated_tile(
    gate: "Any",
    up: "Any",
    gate_bias_ptr: "Any",
    up_bias_ptr: "Any",
    cols: "Any",
    widths: "Any",
    width: "Any",
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
) -> "Any":
    """act(gate + bias) * (up + bias), zero where a row is not wide enough."""
    if HAS_BIAS:
        gate += tl.load(gate_bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        up += tl.load(up_bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    return tl.where(cols[None, :] < widths[:, None], _activate(gate, up, GELU), 0.0)


@triton.jit
def _activate(
    gate: "Any",
    up: "Any",
    GELU: tl.constexpr,
) -> "Any":
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up  # 0.5 (1 + tanh z) = sigmoid(2 z)
    return gate * tl.sigmoid(gate) * up
