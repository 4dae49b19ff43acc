"""Rotary position embedding: frequencies and the table of cosines and sines.

Dimension pair i of a head turns by position * inv_freq[i]; kinds differ in how they stretch the wavelengths. The order
of float32 operations is that of transformers, so that tables are equal bit for bit.
"""

import math

import torch

from sortserve.engine.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Radians per position, float32 [head_dim / 2], and the factor for cosines and sines (1 except for yarn).

    `dynamic` is resolved for `max_model_len` and then stays: up to the original context the frequencies are the plain
    ones, as in transformers; beyond, those that transformers uses for a sequence of exactly `max_model_len` tokens.
    There they change as a sequence grows, while its cached keys stay as they were turned, so a result depends on how
    the prompt was chunked; no server with chunks, prefix cache and refills could reproduce that.
    """
    assert head_dim % 2 == 0, head_dim
    assert max_model_len > 0, max_model_len
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    theta = rope.theta
    if rope.kind == "dynamic":
        stretched = max(max_model_len, rope.original_max_position) / rope.original_max_position
        theta *= (rope.factor * stretched - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    wavelength = theta**exponent  # over 2 pi
    plain = 1.0 / wavelength
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        stretched_freq = 1.0 / (rope.factor * wavelength)
        kept = 1 - _yarn_ramp(rope, head_dim)
        return stretched_freq * (1 - kept) + plain * kept, _yarn_attention_factor(rope)
    return plain, 1.0


def rope_table(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [max_model_len, head_dim / 2] each, with yarn's attention factor in both.

    With x1, x2 the first and the second half of a head: (x1 * cos - x2 * sin, x2 * cos + x1 * sin).
    """
    frequencies, factor = inverse_frequencies(rope, head_dim, max_model_len)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies  # [max_model_len, head_dim / 2]
    return angles.cos() * factor, angles.sin() * factor


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Short wavelengths stay, long ones are stretched by the factor, those between are blended."""
    context = rope.original_max_position
    wavelength = 2 * math.pi / plain
    is_long = wavelength > context / rope.low_freq_factor
    is_short = wavelength < context / rope.high_freq_factor
    scaled = torch.where(is_long, plain / rope.factor, plain)
    share = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * scaled / rope.factor + share * scaled
    return torch.where(is_long | is_short, scaled, blended)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """How far each dimension pair is stretched, [head_dim / 2]: 0 as it was, 1 by the whole factor."""

    def dimension(rotations: float) -> float:
        """The dimension that makes so many rotations over the original context."""
        ratio = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # a step
    return torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width, 0, 1)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
