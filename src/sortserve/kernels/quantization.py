"""Weight-only quantization: w[o, i] ~ scale[o] * values[o, i], one scale per output channel.

    int8: scale = max_i |w| / 127, values = round(w / scale) in [-127, 127], ties to even
    fp8:  scale = max_i |w| / 448, values = w / scale rounded to float8_e4m3fn

The maximum runs over the whole reduction dimension, so a matrix is quantized once and whole, before it is cut: every width
of the ladder is a prefix of the same values with the same scales, also in `down`, whose reduction dimension is the width.
There is no zero point, so a product is scale[o] * sum_i values[o, i] * x[i] and the scale comes in once, after the sum.
"""

from typing import Literal

import torch
from torch import Tensor

QuantKind = Literal["int8", "fp8"]

DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
_CHUNK_ELEMENTS = 1 << 22
"""Elements that are float32 at a time: a head of 136 M elements would else need half a gigabyte for a moment."""


def quantize(weight: Tensor, kind: QuantKind) -> tuple[Tensor, Tensor]:
    """weight [out, in], any float dtype -> (values [out, in] int8 or float8_e4m3fn, scale float32 [out]).

    A channel of zeros has scale 1. Raises ValueError for weights that are not finite.
    """
    assert weight.dim() == 2, weight.shape
    values = torch.empty(weight.shape, dtype=DTYPES[kind], device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].to(torch.float32, copy=True)
        part_scale = part.abs().amax(dim=1).div_(LARGEST[kind])
        if not bool(part_scale.isfinite().all()):
            raise ValueError("weights that are not finite cannot be quantized")
        # below float32's smallest normal number a channel is as good as zero, and its quotients would overflow
        part_scale.masked_fill_(part_scale < torch.finfo(torch.float32).tiny, 1.0)
        part.div_(part_scale[:, None]).clamp_(-LARGEST[kind], LARGEST[kind])
        values[start : start + rows] = part.round_() if kind == "int8" else part
        scale[start : start + rows] = part_scale
    return values, scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that `values` and `scale` stand for, [out, in]: the product in float32, rounded to `dtype`."""
    assert scale.shape == values.shape[:1], (scale.shape, values.shape)
    return values.float().mul_(scale[:, None]).to(dtype)
