"""What a pass of training computes: the operations of its matrix products, from shapes alone.

A product of [m, k] and [k, n] is 2mkn. Backward is twice forward where weights are trained, once (and the adapters' share
on top) where they are frozen. Attention counts whole squares, as they are computed. Norms, softmax, rotary embedding and the
optimiser count nothing: what they cost shows as a lower share of the machine's rate.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from sortserve.engine.submodel import ModelShape
from sortserve.sorting.nested import SubModels


def model_shape(config: Any) -> ModelShape:
    """The shape that a transformers config names."""
    return ModelShape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.vocab_size,
    )


def pass_flops(
    shape: ModelShape, chosen: SubModels, num_tokens: int, window: int, *, frozen: bool = False, lora_rank: int = 0
) -> float:
    """Of forward and backward of one pass: layers once, the head once per exit."""
    layers = sum(layer not in chosen.skipped for layer in range(chosen.exits[-1]))
    ffn = 3 * shape.hidden_size * chosen.width
    # scores and their product with V; no weights, so backward is twice forward in any case
    attention = 2 * window * shape.num_heads * shape.head_dim
    weights = layers * (shape.attention_parameters + ffn) + len(chosen.exits) * shape.head_parameters
    heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    # A of five projections and B of two are as wide as the residual stream
    adapters = layers * lora_rank * (7 * shape.hidden_size + heads + 3 * chosen.width)
    backward = 2 if frozen else 3
    return 2.0 * num_tokens * (backward * weights + 3 * adapters + 3 * layers * attention)


def machine_flops(
    dtype: torch.dtype, device: torch.device, seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Operations a second of one large product, the best of several: the rate that shares are given of."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = clock()
        float((a @ b)[0, 0])  # reading a value waits for the device
        best = max(best, 2.0 * 2048**3 / (clock() - start))
    return best
