"""One forward pass of a transformers model that stops at several exits, at a prefix of the FFN's neurons.

Contract: `exit_states(model, tokens, SubModels(...))` gives the normed hidden states of the asked exits, [exits,
windows, length, hidden], of a Llama, Mistral, Qwen2 or Qwen3; an exit at depth d is the first d layers and then the
model's own final norm (Sorted LLaMA: one norm and one head for all exits). Width w keeps rows [0, w) of gate and up and
columns [0, w) of down (SortedNet). The model's modules and parameters stay what they are: the sub-model is an argument,
so a checkpoint saved from the model is an ordinary one. LoRA layers of peft are understood.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.sorting.attention import Rotation, self_attention
from sortserve.sorting.norm import rms_norm


@dataclass(frozen=True, slots=True)
class SubModels:
    """What one pass runs: ascending exits that share one width. `skipped` layers are left out (layer dropout)."""

    exits: tuple[int, ...]
    width: int
    skipped: frozenset[int] = frozenset()


def check_family(model: Any) -> None:
    """Raises SortingError if `exit_states` would not compute what the model does."""
    if model.config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        raise SortingError(f"model type {model.config.model_type!r}; there are llama, mistral, qwen2 and qwen3")


def exit_states(model: Any, tokens: Tensor, chosen: SubModels, checkpointed: bool = False) -> Tensor:
    """[exits, windows, length, hidden], normed, of `tokens` [windows, length]. `checkpointed`: keep only the residual
    stream between layers and compute the rest again in the backward pass."""
    body = model.model
    x = body.embed_tokens(tokens)
    rotation = Rotation.of(model, x)
    taken = []
    for index, layer in enumerate(body.layers[: chosen.exits[-1]]):
        if index not in chosen.skipped:
            if checkpointed:
                x = torch.utils.checkpoint.checkpoint(_layer, layer, x, rotation, chosen.width, use_reentrant=False)
            else:
                x = _layer(layer, x, rotation, chosen.width)
        if index + 1 in chosen.exits:
            taken.append(x)
    return rms_norm(body.norm, torch.stack(taken))


def _layer(layer: Any, x: Tensor, rotation: Rotation, width: int) -> Tensor:
    x = x + self_attention(layer.self_attn, rms_norm(layer.input_layernorm, x), rotation)
    return x + prefix_ffn(layer.mlp, rms_norm(layer.post_attention_layernorm, x), width)


def prefix_ffn(mlp: Any, x: Tensor, width: int) -> Tensor:
    """The FFN of the first `width` neurons."""
    active = F.silu(prefix_linear(mlp.gate_proj, x, rows=width)) * prefix_linear(mlp.up_proj, x, rows=width)
    return prefix_linear(mlp.down_proj, active)


def prefix_linear(module: Any, x: Tensor, rows: int | None = None) -> Tensor:
    """`module`, plain or of peft, with its first `rows` outputs, and as many inputs as `x` has."""
    base = getattr(module, "base_layer", module)
    columns = x.shape[-1]
    bias = None if base.bias is None else base.bias[:rows]
    out = F.linear(x, base.weight[:rows, :columns], bias)
    if base is module:
        return out
    for name in module.active_adapters:
        low = F.linear(x, module.lora_A[name].weight[:, :columns])
        out = out + F.linear(low, module.lora_B[name].weight[:rows]) * module.scaling[name]
    return out
