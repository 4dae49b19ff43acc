"""What the staircase FFN's kernels share: one layer's weights, and the gated activation."""

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
def activate(
    gate: "Any",
    up: "Any",
    GELU: tl.constexpr,
) -> "Any":
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up  # 0.5 (1 + tanh z) = sigmoid(2 z)
    return gate * tl.sigmoid(gate) * up
