"""The bound told before a run holds what autograd keeps, and is not twice as much."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from sortserve.sorting import memory
from sortserve.sorting.data import inputs_and_targets
from sortserve.sorting.losses import head_loss
from sortserve.sorting.nested import exit_states
from sortserve.sorting.recipe import Grid, Method, Recipe, Train
from sortserve.sorting.sampler import Sampler
from tests.sorting.toy import LAYERS, toy_model, toy_tokens


@pytest.mark.parametrize("window", [32, 128, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("ffn", [96, 1024])
def test_activations(window: int, dtype: Literal["bfloat16", "float32"], checkpointed: bool, ffn: int) -> None:
    """Every tensor that autograd keeps for the backward pass, counted once by its storage."""
    model = toy_model("qwen2", dtype=getattr(torch, dtype), intermediate_size=ffn, hidden_size=64, head_dim=16)
    recipe = Recipe(
        grid=Grid(exits=[2], widths=[48]),
        method=Method(full_width_share=1.0),
        train=Train(tokens_per_pass=2048, window=window, dtype=dtype, checkpointed=checkpointed),
    )
    sampler = Sampler.make(recipe.grid, recipe.method, LAYERS, ffn, 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, targets = inputs_and_targets(toy_tokens(2048 // window, window), 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = exit_states(model, inputs, sampler.passes_of(0)[0].chosen, checkpointed).flatten(1, 2)
        head_loss(states, model.lm_head.weight, targets.reshape(-1), (0.5, 0.5))
    bound = memory.activations(model.config, sampler, recipe)
    assert sum(kept.values()) <= bound
    if not checkpointed:  # whose bound holds a whole layer, which is kept during the backward pass only
        assert bound <= 2 * sum(kept.values())
