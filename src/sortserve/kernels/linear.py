"""y = x W^T + b, the weight packed once for the device it runs on.

On the CPU, oneDNN's own packed layout in place of the original: reading it runs at 16.6 GB/s where `F.linear` on plain
bfloat16 rows reached 11.6 (two cores, one row), and from 32 rows on both take the same time. Elsewhere, and for dtypes
oneDNN does not pack, plain `F.linear`. `reference` is the float64 formula, the oracle of the tests.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(Protocol):
    """One weight matrix [out_features, in_features], kept in whatever form."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, in whatever layout."""

    @property
    def packed(self) -> bool:
        """Whether the weights lie in memory of their own, not the given tensor's."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> x W^T + b [rows, out_features]."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b; neither argument is changed."""


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs this weight here."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


class Linear:
    """One weight matrix [out_features, in_features], packed where that helps."""

    __slots__ = ("bias", "nbytes", "packed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.bias = bias
        self.packed = pack and can_pack(weight)
        # the packed tensor replaces the plain one; the caller must not keep it either
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, in whatever layout."""
        return (self.weight,)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> [rows, out_features]."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)

    def prepare(self, x: Tensor) -> Any:
        """What `silu` and `times` take for x: for weights in x's own dtype, x."""
        return x

    def silu(self, x: Tensor) -> Tensor:
        """silu(x W^T + b), without a pass of its own for the activation."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")
            return out
        return F.silu(F.linear(x, self.weight, self.bias))

    def times(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor * (x W^T + b) in one pass over the output."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")
            return out
        return F.linear(x, self.weight, self.bias).mul_(factor)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b in one pass over the output; neither argument is changed."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
            return out
        return F.linear(x, self.weight, self.bias).add_(residual)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in float64."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()
