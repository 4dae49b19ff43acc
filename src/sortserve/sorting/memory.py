"""How much memory a training step takes at most, from shapes alone; `tests/sorting/test_memory.py` holds it to it.

weights      2 (or 4) bytes each; trained ones 12 more (float32 copy and two moments), 4 for its gradient, 2 for the pass's
activations  of one pass, kept for backward: per token and layer ACTIVATIONS_* values, and attention's squares
head         its chunks of logits, and float32 gradients of the head where it is trained
"""

from typing import Any

from sortserve.sorting.attention import WINDOWS_UP_TO
from sortserve.sorting.losses import CHUNK_BYTES
from sortserve.sorting.recipe import Recipe
from sortserve.sorting.sampler import Sampler


def bound(model: Any, sampler: Sampler, recipe: Recipe) -> int:
    """Bytes beside the weights themselves: optimiser, gradients, activations of the largest pass, logits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    item = 2 if recipe.train.dtype == "bfloat16" else 4
    optimizer = sum(p.numel() for p in trained) * (4 + 8 + 4 + (item if item == 2 else 0))
    return int(optimizer + activations(model.config, sampler, recipe) + head(model, sampler, recipe))


def activations(config: Any, sampler: Sampler, recipe: Recipe) -> int:
    """Bytes kept for backward of the largest pass: all layers at full width."""
    tokens, item = recipe.train.tokens_per_pass, 2 if recipe.train.dtype == "bfloat16" else 4
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    keys = 2 * config.num_key_value_heads * head_dim
    norms = 2 * (2 * config.hidden_size * item + 4)
    layer = norms + (2 * queries + keys + 4 * config.intermediate_size) * item
    windows = {recipe.train.window, *([recipe.train.long_window] if recipe.train.long_every else [])}
    kept = max((window for window in windows if window <= WINDOWS_UP_TO), default=0)
    squares = max(2 * queries * 4, config.num_attention_heads * kept * item)
    exits = len(sampler.exits) if recipe.method.kind == "soft" else 1
    final = exits * config.hidden_size * 4 * item
    if recipe.train.checkpointed:
        return int(tokens * (config.num_hidden_layers * config.hidden_size * item + layer + squares + final))
    return int(tokens * (config.num_hidden_layers * (layer + squares) + final))


def head(model: Any, sampler: Sampler, recipe: Recipe) -> int:
    """Bytes of logits of a chunk, and of the head's float32 gradient."""
    weight = model.lm_head.weight
    chunks = (3 + bool(recipe.method.distill)) * max(CHUNK_BYTES, 16 * 4 * len(weight))
    return int(chunks + (weight.numel() * 6 if weight.requires_grad else 0))
