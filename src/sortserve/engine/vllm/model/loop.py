"""A decoder run in segments: the loop over a stock model's layers, with rows leaving at exits.

It takes a stock model apart and never copies a layer: attention, norms and FFN are called as they are.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from sortserve.engine.errors import StartupError
from sortserve.engine.ladder import Ladder
from sortserve.engine.vllm.model.rows import LayerRows, RowLayouts, Shard, StepRows
from sortserve.engine.vllm.model.widths import WidthMLP
from sortserve.kernels.ffn import FfnRows
from sortserve.kernels.products import choose_products

logger = logging.getLogger(__name__)

CONTEXT_KEY = "sortserve_rows"
"""Of the StepRows in a forward context's `additional_kwargs`."""


def replace_ffns(model: nn.Module, ladder: Ladder, *, sort: bool, compile: bool) -> None:
    """Put a WidthMLP in the place of every layer's FFN that the ladder cuts. `sort`: neurons by importance, as a checkpoint
    without a ladder needs. `compile`: products in C++ may be. Raises StartupError where the model cannot be cut."""
    products = None
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
            raise StartupError("models with ada_rms_norm_t_cond are not supported by SortServe on vLLM")
        boundaries = ladder.ffn_boundaries(number)
        if len(boundaries) == 1:
            continue
        if getattr(layer.mlp.gate_up_proj, "quant_config", None) is not None:
            raise StartupError("quantized checkpoints have one width on vLLM; use a ladder of depths alone")
        if products is None and current_platform.is_cpu():
            products = choose_products(layer.mlp.gate_up_proj.weight.dtype, int8=False, compile=compile)
            logger.info("FFNs with widths: %s", " ".join(filter(None, (products.name, products.reason))))
        layer.mlp = WidthMLP(layer.mlp, boundaries, products, sort=sort)


def row_layouts(model: Any, ladder: Ladder, dtype: torch.dtype, device: torch.device) -> RowLayouts:
    """What lays out steps of `model`, a decoder whose weights are loaded."""
    full = ladder.shape.ffn_width
    shards = [layer.mlp.shard if isinstance(layer.mlp, WidthMLP) else Shard(full, (full,)) for layer in model.layers]
    return RowLayouts(ladder, shards, dtype, device)


def run_segments(
    model: Any, input_ids: Tensor | None, positions: Tensor, embeds: Tensor | None, rows: StepRows | None
) -> Tensor:
    """Normed hidden states [rows of the step, hidden], each as its own exit leaves it.

    `model` is a stock decoder without its head. `rows` None: everything at full depth and width. Padding rows behind
    those of the plan are not computed; they come back as zeros.
    """
    hidden = model.embed_input_ids(input_ids) if embeds is None else embeds
    if rows is None:
        return _full(model, positions, hidden)
    cut_slots(rows)
    padded = hidden.shape[0]
    hidden, positions = hidden[: rows.plan.num_tokens], positions[..., : rows.plan.num_tokens]
    residual: Tensor | None = None
    left: list[Tensor] = []  # the last rows first
    for segment in rows.plan.segments:
        stay = segment.num_tokens
        if stay < hidden.shape[0]:
            assert residual is not None
            left.append(model.norm(hidden[stay:], residual[stay:])[0])
            hidden, residual, positions = hidden[:stay], residual[:stay], positions[..., :stay]
        for number in range(segment.start, segment.end):
            hidden, residual = run_layer(model.layers[number], positions, hidden, residual, rows.layers[number])
    left.append(model.norm(hidden, residual)[0])
    if padded > rows.plan.num_tokens:
        left.insert(0, hidden.new_zeros(padded - rows.plan.num_tokens, hidden.shape[1]))
    return left[0] if len(left) == 1 else torch.cat(left[::-1])


def run_layer(
    layer: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None, rows: LayerRows
) -> tuple[Tensor, Tensor]:
    """One stock layer: what is added to the residual stream next, and the stream."""
    if rows.ffn is None and rows.attention is None:
        whole: tuple[Tensor, Tensor] = layer(positions, hidden, residual)
        return whole
    if residual is None:
        residual = hidden
        hidden = layer.input_layernorm(hidden)
    else:
        hidden, residual = layer.input_layernorm(hidden, residual)
    hidden = layer.self_attn(positions=positions, hidden_states=hidden)
    if rows.attention is not None:
        hidden = hidden * rows.attention
    hidden, residual = layer.post_attention_layernorm(hidden, residual)
    if rows.ffn is None:
        return layer.mlp(hidden), residual
    if isinstance(layer.mlp, WidthMLP):
        return layer.mlp(hidden, rows.ffn), residual
    return _whole_or_none(layer.mlp, hidden, rows.ffn), residual


def rows_of_step() -> StepRows | None:
    """What the runner has put into vLLM's forward context; None in dummy runs."""
    if not is_forward_context_available():
        return None
    rows: StepRows | None = get_forward_context().additional_kwargs.get(CONTEXT_KEY)
    return rows


def cut_slots(rows: StepRows) -> None:
    """Leave each layer as many K/V slots as it has rows: vLLM writes K and V for as many rows as there are slots, in an
    operation of its own that reads them from the forward context."""
    context = get_forward_context()
    if not isinstance(context.slot_mapping, dict):
        return
    tokens = {
        layer: segment.num_tokens for segment in rows.plan.segments for layer in range(segment.start, segment.end)
    }
    context.slot_mapping = {
        name: mapping[: tokens.get(extract_layer_index(name), 0)] for name, mapping in context.slot_mapping.items()
    }


def _full(model: Any, positions: Tensor, hidden: Tensor) -> Tensor:
    residual: Tensor | None = None
    for layer in model.layers:
        hidden, residual = layer(positions, hidden, residual)
    normed: Tensor = model.norm(hidden, residual)[0]
    return normed


def _whole_or_none(mlp: Any, x: Tensor, rows: FfnRows) -> Tensor:
    """A stock FFN where some rows skip it; its one block has the full width, so nobody ends inside."""
    out = torch.zeros_like(x)
    for block in rows.blocks:
        if block.index is None:
            out[: block.first] = mlp(x[: block.first])
        else:
            out[block.index] = mlp(x[block.index])
    return out
