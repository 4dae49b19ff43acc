"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size], weight [size] -> same shape and dtype as x.

    The rounding order is that of the Hugging Face models: normalised in float32, rounded, then multiplied.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    if x.dtype == torch.float32:
        return (wide * scale).mul_(weight)
    return wide.mul_(scale).to(x.dtype).mul_(weight)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
