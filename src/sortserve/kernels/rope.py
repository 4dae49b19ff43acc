"""Rotary position embedding as a complex product: head dimensions are stored pairwise, (x0, y0, x1, y1, ...).

Hugging Face checkpoints store (x0, x1, ..., y0, y1, ...); the rows of the Q and K projections are put in pairs once at
load (`pair_rows`). Q.K is the same for any order that both share, and the rotation becomes one multiplication.
"""

import torch
from torch import Tensor


def pair_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder [heads * head_dim, ...] from halves to pairs within each head; a copy."""
    heads = weight.shape[0] // head_dim
    halves = weight.view(heads, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [rows, heads, head_dim] in pairs, rotation complex64 [rows, 1, head_dim / 2] -> x's shape and dtype."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).view(x.shape).to(x.dtype)


def reference(x: Tensor, angles: Tensor) -> Tensor:
    """The rotation of halves (x, y) by `angles` [rows, head_dim / 2], in float64, as Hugging Face models store them."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
