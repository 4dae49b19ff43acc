"""Attention of a transformers layer as training runs it: causal, over whole windows, without a cache.

    P = softmax(scale Q K^T + mask)    O = P V
    dV = P^T dO    dS = P * (dP - rowsum(P * dP)), dP = dO V^T    dQ = scale dS K    dK = scale dS^T Q

Contract: `self_attention` is what the module's own forward would be, for Llama, Mistral, Qwen2 and Qwen3, peft's layers in
them included. On a CPU a window at a time goes through the formulas above, so that its squares stay in the core's cache;
heads that share one head of K and V are rows of one product. Kept for backward are Q, K, V and P in the dtype of the states;
transformers' plain attention keeps the softmax in float32 too, and copies it to and fro.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.sorting.norm import rms_norm

WINDOWS_UP_TO = 512
"""Length up to which the squares are kept on a CPU. PyTorch's fused attention is slower there, its backward above all: a
step of the bundled model at 256 tokens took 865 ms, with plain attention 775. Over 512 tokens the squares need too much."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary tables [length, heads, head_dim], repeated for every head, so that products run over long rows."""

    cos: Tensor
    sin: Tensor
    """Negative in the first half of a head."""

    @classmethod
    def of(cls, model: Any, x: Tensor) -> "Rotation":
        """The model's own, for windows as long as those of `x` [windows, length, hidden]."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = (table[0] for table in model.model.rotary_emb(x, position_ids=positions))  # [length, head_dim]
        half, heads = cos.shape[-1] // 2, model.config.num_attention_heads
        signed = torch.cat([-sin[:, :half], sin[:, half:]], -1)
        return cls(*(table[:, None].repeat(1, heads, 1) for table in (cos, signed)))

    def turn(self, x: Tensor) -> Tensor:
        """`x` [windows, length, heads, head_dim], with all heads or those of K; halves of a head turn as pairs."""
        heads = x.shape[2]
        return _Turn.apply(x, self.cos[:, :heads], self.sin[:, :heads])  # type: ignore[no-any-return, no-untyped-call]


def self_attention(module: Any, x: Tensor, rotation: Rotation) -> Tensor:
    """What attention adds to the residual stream; `x` [windows, length, hidden] is normed."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (projection(x).unflatten(-1, (-1, module.head_dim)) for projection in projections)
    if hasattr(module, "q_norm"):
        query, key = rms_norm(module.q_norm, query), rms_norm(module.k_norm, key)
    query, key, value = (one.transpose(1, 2) for one in (rotation.turn(query), rotation.turn(key), value))
    return module.o_proj(causal_attention(query, key, value, module.scaling).flatten(2))  # type: ignore[no-any-return]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[windows, length, heads, head_dim] of `query` [windows, heads, length, head_dim], `key` and `value` [windows,
    kv_heads, length, head_dim]."""
    if query.device.type == "cpu" and query.shape[2] <= WINDOWS_UP_TO:
        return _Windows.apply(query, key, value, scale)  # type: ignore[no-any-return, no-untyped-call]
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2)


class _Turn(torch.autograd.Function):
    """Its gradient turns back: both halves of the tables are equal but for the sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        x = gradients[0]
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=-1), None, None


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        windows, heads, length, size = query.shape
        groups = key.shape[1]
        rows = heads // groups * length
        mask = query.new_full((length, length), torch.finfo(query.dtype).min).triu_(1).repeat(heads // groups, 1)
        shares = query.new_empty(windows, groups, rows, length)
        out = query.new_empty(windows, length, heads, size)
        for window in range(windows):
            asked = query[window].reshape(groups, rows, size)
            scores = torch.baddbmm(mask, asked, key[window].transpose(1, 2), alpha=scale)
            torch.softmax(scores, -1, out=shares[window])
            mixed = torch.bmm(shares[window], value[window])
            out[window] = mixed.view(heads, length, size).transpose(0, 1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, shares = ctx.saved_tensors
        heads, length, size = query.shape[1:]
        groups, rows = shares.shape[1:3]
        # laid out as the projections are, so that their backward copies nothing
        d_query, d_key, d_value = (torch.empty_like(one.transpose(1, 2)).transpose(1, 2) for one in (query, key, value))
        for window, share in enumerate(shares):
            d_out = gradients[0][window].transpose(0, 1).reshape(groups, rows, size)
            d_value[window] = torch.bmm(share.transpose(1, 2), d_out)
            d_share = torch.bmm(d_out, value[window].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_share, share, -1, share.dtype)
            asked = query[window].reshape(groups, rows, size)
            d_query[window] = torch.bmm(d_scores, key[window]).mul_(ctx.scale).view(heads, length, size)
            d_key[window] = torch.bmm(d_scores.transpose(1, 2), asked).mul_(ctx.scale)
        return d_query, d_key, d_value, None
