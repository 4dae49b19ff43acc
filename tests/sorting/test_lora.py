"""Adapters merge exactly, also for prefixes of neurons, and rank-sorted ones for prefixes of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.sorting.lora import RankPrefix, adapted, add_adapters, merge, save_adapters
from sortserve.sorting.nested import SubModels, exit_states
from sortserve.sorting.recipe import Lora
from tests.sorting.toy import LAYERS, WIDTH, toy_model, toy_tokens

RANK, ALPHA = 6, 9.0


def adapted_model(sorted_ranks: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, RankPrefix]:
    """With random adapters: peft starts B at zero, which would hide all mistakes."""
    model = toy_model("qwen2", dtype=dtype)
    prefix = add_adapters(model, Lora(rank=RANK, alpha=ALPHA, sorted_ranks=sorted_ranks))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model, prefix


@torch.no_grad()
def states(model: Any, width: int = WIDTH) -> Tensor:
    return exit_states(model, toy_tokens(), SubModels((2, LAYERS), width))


@pytest.mark.parametrize("width", [WIDTH, 20])
@pytest.mark.parametrize("sorted_ranks", [False, True])
def test_merged_weights_compute_what_the_adapters_did(width: int, sorted_ranks: bool) -> None:
    model, prefix = adapted_model(sorted_ranks)
    with_adapters, without = states(model, width), states(toy_model("qwen2"), width)
    names = set(toy_model("qwen2").state_dict())
    merge(model, prefix)
    assert torch.allclose(states(model, width), with_adapters, atol=1e-4)
    assert not torch.allclose(without, with_adapters, atol=0.1)
    assert set(model.state_dict()) == names, "an ordinary checkpoint again"


def test_merging_rounds_once() -> None:
    model, prefix = adapted_model(dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    a, b = (one["default"].weight.detach().float() for one in (layer.lora_A, layer.lora_B))
    expected = (layer.base_layer.weight.detach().float() + ALPHA / RANK * b @ a).bfloat16()
    merge(model, prefix)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


@pytest.mark.parametrize("rank", [1, 4, RANK])
def test_a_rank_prefix_is_the_truncated_adapter(rank: int) -> None:
    """W + alpha / b * B[:, :b] A[:b], in attention (peft's own forward) and FFN (ours), and in what is merged."""
    model, prefix = adapted_model(sorted_ranks=True)
    expected = toy_model("qwen2")
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a = layer.lora_A["default"].weight
            b = layer.lora_B["default"].parametrizations.weight.original
            with torch.no_grad():
                expected.get_submodule(name).weight += ALPHA / rank * b[:, :rank] @ a[:rank]
    prefix.rank = rank
    assert torch.allclose(states(model), states(expected), atol=1e-4)
    prefix.rank = 3  # what the last pass drew is not what is merged
    merge(model, prefix, rank)
    assert torch.allclose(states(model), states(expected), atol=1e-4)


def test_ranks_beyond_the_drawn_one_are_not_trained() -> None:
    model, prefix = adapted_model(sorted_ranks=True)
    prefix.rank = 2
    exit_states(model, toy_tokens(), SubModels((LAYERS,), WIDTH)).square().mean().backward()  # type: ignore[no-untyped-call]
    for layer in adapted(model):
        a = layer.lora_A["default"].weight.grad
        b = layer.lora_B["default"].parametrizations.weight.original.grad
        assert a[:2].any()
        assert b[:, :2].any()
        assert not a[2:].any()
        assert not b[:, 2:].any()


def test_only_adapters_are_trained() -> None:
    model = toy_model()
    add_adapters(model, Lora(norms=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "norm" in name for name in trained)
    assert any("lora_" in name for name in trained)
    assert "model.norm.weight" in trained


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.parametrize("sorted_ranks", [False, True])
def test_what_is_saved_is_read_by_peft(tmp_path: Path, sorted_ranks: bool) -> None:
    model, _ = adapted_model(sorted_ranks)
    save_adapters(model, Lora(rank=RANK, alpha=ALPHA), tmp_path / "adapter")
    read = PeftModel.from_pretrained(toy_model("qwen2"), tmp_path / "adapter").eval()
    with torch.no_grad():
        found = model.lm_head(states(model)[-1])
        assert torch.allclose(read(toy_tokens()).logits, found, atol=1e-4)


def test_targets_that_are_not_there() -> None:
    with pytest.raises(SortingError, match="w_pack"):
        add_adapters(toy_model(), Lora(targets=["q_proj", "w_pack"]))
