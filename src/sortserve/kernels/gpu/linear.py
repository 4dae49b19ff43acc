"""y = x W^T + b (+ residual): cuBLAS for weights of the model's dtype, the weight-only product for int8 and fp8.

cuBLAS reads a weight at the speed of memory from one row on and has tiles for every size; what it lacks are narrow
weights with a scale per output channel, which product.py de-quantises in registers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """x [rows, in] and weight [out, in] (x's dtype, or int8 / float8_e4m3fn with float32 scales [out]) -> [rows, out]."""
    if scale is not None or weight.dtype != x.dtype:
        return product(x, weight, scale, bias, residual, out=out)
    result = F.linear(x, weight, bias) if residual is None else torch.addmm(residual, x, weight.T)
    if residual is not None and bias is not None:
        result += bias
    return result if out is None else out.copy_(result)
