"""RMSNorm as training runs it: a third of the passes over memory that transformers' takes.

    n = x / rms(x)    y = w n    dw = sum g n    dx = (g w - n mean(g w n)) / rms(x)

n is computed in float32 and rounded once, as transformers does it. Kept for backward are n, in the dtype of the states, and
1 / rms(x); transformers keeps x and n in float32.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """What `module`, a norm of Llama, Mistral, Qwen2 or Qwen3, makes of `x` [..., size]."""
    return _RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed: Tensor = (x * inverse).to(x.dtype)
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, inverse = ctx.saved_tensors
        gradient = gradients[0]
        d_weight = (gradient * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_normed = gradient * weight
        along = (d_normed * normed).sum(-1, keepdim=True, dtype=inverse.dtype).div_(normed.shape[-1])
        d_x = d_normed.addcmul_(normed, along.to(normed.dtype), value=-1).mul_(inverse.to(normed.dtype))
        return d_x, d_weight, None
