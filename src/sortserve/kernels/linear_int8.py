"""y = x W^T + b over int8 weights on the CPU, as exact as the bfloat16 call: activations are cut into planes of bytes.

PyTorch's own weight-only call, `_weight_int8pack_mm`, is bound by computing: at 8 rows it takes twice as long as packed
bfloat16 (and it crashed on a [33, 129] weight). oneDNN's int8 product is quick, but its activations are bytes too, and 8
bits are too few for them. Here each row gets 16 bits (24 of a float32 row) as two (three) rows of bytes, which costs no
further pass over the weights:

    step[r]  = max_i |x[r, i]| / 32637
    x[r, i] ~ step[r] * (256 (high - 128) + (low - 128)),   high and low in [0, 255]
    y[r, o]  = step[r] * (256 p_high + p_low) + b[o],   p = scale[o] * sum_i values[o, i] * (byte[i] - 128)

Sums over i are exact in int32, so what a row gets does not depend on its batch-mates. The error is half a step of x, 2^-16
of the row's largest value; bfloat16 itself rounds that value by 2^-9.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.kernels.linear import Linear
from sortserve.kernels.quantization import dequantize

MOST_INPUTS = (2**31 - 1) // (255 * 127)
"""Inputs whose products with bytes always sum up within int32."""
_SMALLEST = 1e-30  # of the largest value of a row: a row of zeros gets this step and stays zero


def is_exact() -> bool:
    """Whether oneDNN multiplies bytes here without saturation, found by doing it. Processors without VNNI add pairs of
    products in 16 bits."""
    if not torch._C._has_mkldnn:
        return False
    values = torch.full((64, 64), 127, dtype=torch.int8)
    try:
        linear = Int8Linear(values, torch.ones(64))
        got = linear._multiply(torch.full((2, 64), 255, dtype=torch.uint8))
    except RuntimeError:
        return False
    return bool((got == 64 * 127 * (255 - 128)).all())


@dataclass(frozen=True, slots=True)
class Planes:
    """Rows as bytes: `data` uint8 [planes * rows, in], the highest bytes of all rows first; `step` float32 [rows, 1]."""

    data: Tensor
    step: Tensor


def split(x: Tensor) -> Planes:
    """Cut x [rows, in] into planes: three of a float32 row, two of others."""
    count = 3 if x.dtype == torch.float32 else 2
    ones = sum(256**place for place in range(count))  # a 1 in every byte
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    # 2 less than fits: float32 may round the quotient of the largest value up, and one step more would wrap around
    step = largest.clamp_min_(_SMALLEST).div_(127 * ones - 2)
    steps = (x / step).round_().to(torch.int32).add_(128 * ones)
    data = torch.empty(count, *x.shape, dtype=torch.uint8)
    for place in range(count):
        data[place] = steps >> (8 * (count - 1 - place))  # a byte keeps the lowest 8 bits
    return Planes(data.view(-1, x.shape[1]), step)


class Int8Linear(Linear):
    """One weight matrix as int8 `values` [out, in] with float32 `scale` [out]; needs `is_exact`."""

    __slots__ = ("_offset", "_scale", "_zero")

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        assert values.dtype == torch.int8, values.dtype
        assert scale.shape == values.shape[:1], (scale.shape, values.shape)
        assert values.shape[1] <= MOST_INPUTS, values.shape
        self.bias = None if bias is None else bias.float()
        self.packed = True
        self._scale = scale.float().contiguous()
        # what the 128 that every byte has too much adds up to
        self._offset = values.sum(1, dtype=torch.int64).double().mul_(scale.double()).mul_(-128.0).float()
        self._zero = torch.zeros(values.shape[0], dtype=torch.int32)
        small = (self._scale, self._offset, self._zero, *([] if self.bias is None else [self.bias]))
        self.nbytes = values.nbytes + sum(tensor.nbytes for tensor in small)
        self.weight = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)

    def prepare(self, x: Tensor) -> Planes:
        """Cut x into planes, once for all matrices that read it."""
        return split(x)

    def _multiply(self, data: Tensor) -> Tensor:
        """data uint8 [rows, in] -> float32 [rows, out]: scale * sum of values * (data - 128)."""
        one, none = 1.0, 0  # scale and zero point of input and output
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            data,
            one,
            none,
            self.weight,
            self._scale,
            self._zero,
            self._offset,
            one,
            none,
            torch.float32,
            "none",
            [],
            "",
        )
        return out

    def _product(self, x: Tensor | Planes) -> Tensor:
        """x [rows, in] -> float32 [rows, out]."""
        planes = x if isinstance(x, Planes) else split(x)
        parts = self._multiply(planes.data).view(-1, planes.step.shape[0], self._scale.shape[0])
        high = parts[0]
        for plane in parts[1:]:
            high = plane.add_(high, alpha=256.0)
        out = high.mul_(planes.step)
        return out if self.bias is None else out.add_(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> [rows, out_features], in the dtype of x."""
        return self._product(x).to(x.dtype)

    def silu(self, x: Any) -> Tensor:
        """silu(x W^T + b), float32; x as it is or prepared."""
        return F.silu(self._product(x), inplace=True)

    def times(self, factor: Tensor, x: Any) -> Tensor:
        """factor * (x W^T + b), float32; x as it is or prepared."""
        return self._product(x).mul_(factor)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, summed in float32."""
        return self._product(x).add_(residual).to(residual.dtype)


def reference(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in float64, over activations as they are."""
    out = x.double() @ dequantize(values, scale, torch.float32).double().T
    return out if bias is None else out + bias.double()
