"""y = x W^T + b (+ residual): cuBLAS for weights of the model's dtype, the weight-only product for int8 and fp8.

cuBLAS reads a weight at the speed of memory from one row on and has tiles for every size; what it lacks are narrow
weights with a scale per output channel, which product.py de-quantises in registers.
"""

import torch
from torch import Tensor

from sortserve.kernels.gpu.checks import expect, output
from sortserve.kernels.gpu.product import product, reference

__all__ = ["linear", "reference"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, in] and weight [out, in] (x's dtype, or int8 / float8_e4m3fn with float32 scales [out]) -> [rows, out].
    `out` may be `residual`. Raises ValueError."""
    if scale is not None or weight.dtype != x.dtype:
        return product(x, weight, scale, bias, residual, out=out)
    expect("x", x, (x.shape[0], weight.shape[1]), x)
    if residual is not None:
        expect("residual", residual, (x.shape[0], weight.shape[0]), x)
    if out is not None:
        output("out", out, (x.shape[0], weight.shape[0]), x)
    if residual is None and bias is None:
        return torch.mm(x, weight.T, out=out)
    first = bias if residual is None else residual  # rides on the product
    result = torch.addmm(first, x, weight.T, out=out)  # type: ignore[arg-type]
    return result if residual is None or bias is None else result.add_(bias)
