"""The sorted loss of the bundled model: every exit trained at once, over a drawn FFN width prefix.

Contract: `make_sorted(model)` lets a genuine `LlamaForCausalLM` run with the first `w` FFN neurons of every layer
(gate/up keep rows [0, w), down keeps columns [0, w)) without a change to its parameters or state dict;
`exit_losses(model, tokens, bos_id)` returns the token losses of every exit, shape (exits, windows, length).
An exit at depth d is: the first d layers, then the model's own final RMSNorm and head, shared by all exits.

Depth follows Sorted LLaMA / SoFT (Kavehzadeh et al. 2023, "Sorted LLaMA: Unlocking the Potential of Intermediate
Layers of Large Language Models for Dynamic Inference"): the mean of the exits' cross-entropies, one shared head.
Width follows SortedNet (Valipour et al. 2023, arXiv 2309.00255): nested prefixes, one drawn per micro-batch.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EXITS: tuple[int, ...] = (2, 4, 6, 8)
WIDTHS: tuple[int, ...] = (512, 256, 128)


@dataclass
class Width:
    """The FFN prefix in use, shared by all layers of one model."""

    value: int


def _prefix_mlp(mlp: Any, width: Width, x: Tensor) -> Tensor:
    w = width.value
    gate = F.linear(x, mlp.gate_proj.weight[:w])
    up = F.linear(x, mlp.up_proj.weight[:w])
    return F.linear(F.silu(gate) * up, mlp.down_proj.weight[:, :w])


def make_sorted(model: Any) -> Width:
    """Route every layer's FFN through a width prefix; set `.value` of the returned object to choose it."""
    width = Width(int(model.config.intermediate_size))
    for layer in model.model.layers:
        # Only the bound forward is replaced: parameters keep their names, so the checkpoint stays plain Llama.
        layer.mlp.forward = functools.partial(_prefix_mlp, layer.mlp, width)
    return width


def draw_width(rng: random.Random, widths: Sequence[int] = WIDTHS) -> int:
    """Sandwich style: the full width half of the time, as the one used most, else one of the narrower."""
    return widths[0] if rng.random() < 0.5 else rng.choice(list(widths[1:]))


def exit_losses(model: Any, tokens: Tensor, bos_id: int, exits: Sequence[int] = EXITS) -> Tensor:
    """Next-token losses in nats of every exit over `tokens` (windows, length), each window opened by BOS."""
    # BOS opens every window, as it opens every prompt at serving time; all tokens of a window are then targets.
    inputs = torch.cat([torch.full_like(tokens[:, :1], bos_id), tokens[:, :-1]], dim=1)
    out = model.model(input_ids=inputs, output_hidden_states=True, use_cache=False)
    depth = int(model.config.num_hidden_layers)
    inner = [out.hidden_states[d] for d in exits if d < depth]
    # The last hidden state comes out of the model normed already; the earlier ones are raw residual streams.
    normed = [*([model.model.norm(torch.stack(inner))] if inner else []), out.last_hidden_state[None]]
    logits = model.lm_head(torch.cat(normed)).float()
    targets = tokens.expand(len(exits), *tokens.shape)
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return losses.view(len(exits), *tokens.shape)
