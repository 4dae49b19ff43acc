"""What a pass is said to compute is what PyTorch counts while it runs."""

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from sortserve.sorting import lora
from sortserve.sorting.data import inputs_and_targets
from sortserve.sorting.flops import model_shape, pass_flops
from sortserve.sorting.losses import head_loss
from sortserve.sorting.nested import SubModels, exit_states
from sortserve.sorting.recipe import Lora
from tests.sorting.toy import LAYERS, WIDTH, toy_model, toy_tokens

WINDOWS, LENGTH = 3, 20


def counted(model: Any, chosen: SubModels) -> int:
    """Of forward and backward: layers, attention, and the head of every exit."""
    inputs, targets = inputs_and_targets(toy_tokens(WINDOWS, LENGTH), 0)
    with FlopCounterMode(display=False) as counter:
        states = exit_states(model, inputs, chosen).flatten(1, 2)
        scale = (1 / len(chosen.exits),) * len(chosen.exits)
        loss = head_loss(states, model.lm_head.weight, targets.reshape(-1), scale)
        loss.total.backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "chosen",
    [
        SubModels((LAYERS,), WIDTH),
        SubModels((2,), 17),
        SubModels((1, 3, LAYERS), WIDTH),
        SubModels((2, LAYERS), 9, frozenset({1})),
    ],
    ids=["full", "small", "exits", "skipped"],
)
def test_every_product_is_counted_once(family: str, chosen: SubModels) -> None:
    model = toy_model(family)
    expected = pass_flops(model_shape(model.config), chosen, WINDOWS * LENGTH, LENGTH)
    assert counted(model, chosen) == expected


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    """All but the first layer, whose input needs none: its projections' products backward are not made."""
    model = toy_model()
    adapters = Lora(rank=4)
    lora.add_adapters(model, adapters)
    shape, tokens = model_shape(model.config), WINDOWS * LENGTH
    chosen = SubModels((2, LAYERS), 17)
    expected = pass_flops(shape, chosen, tokens, LENGTH, frozen=True, lora_rank=adapters.rank)
    outputs = shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    not_made = 2 * tokens * shape.hidden_size * (outputs + 3 * adapters.rank)
    assert counted(model, chosen) == expected - not_made
