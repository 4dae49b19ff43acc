"""A pass computes what the sub-models it names are, leaves the model as it is, and nests."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.sorting.attention import WINDOWS_UP_TO, causal_attention
from sortserve.sorting.nested import SubModels, check_family, exit_states
from sortserve.sorting.norm import rms_norm
from tests.sorting.toy import HIDDEN, LAYERS, WIDTH, toy_model, toy_tokens


def logits(model: Any, tokens: Tensor, chosen: SubModels) -> Tensor:
    found: Tensor = model.lm_head(exit_states(model, tokens, chosen))
    return found


def cut(model: Any, depth: int, width: int) -> Any:
    """An independent model of the first layers and neurons, run by transformers."""
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:depth]
    small.config.num_hidden_layers = depth
    for layer in small.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight = torch.nn.Parameter(projection.weight[:width].clone())
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :width].clone())
    return small


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("width", [WIDTH, 17])
def test_every_exit_is_the_cut_model(family: str, width: int) -> None:
    model, tokens = toy_model(family), toy_tokens()
    with torch.no_grad():
        found = logits(model, tokens, SubModels((1, 3, LAYERS), width))
        for place, depth in enumerate((1, 3, LAYERS)):
            expected = cut(model, depth, width)(tokens).logits
            assert torch.allclose(found[place], expected, atol=2e-5), (depth, (found[place] - expected).abs().max())


@pytest.mark.parametrize("length", [WINDOWS_UP_TO, WINDOWS_UP_TO + 1])
def test_plain_and_fused_attention_agree(length: int) -> None:
    """And both are causal: the last token changes nothing before it."""
    model, tokens = toy_model(), toy_tokens(1, length)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 90
    with torch.no_grad():
        found = logits(model, tokens, SubModels((LAYERS,), WIDTH))[0]
        assert torch.allclose(found, model(tokens).logits, atol=2e-5)
        changed = logits(model, other, SubModels((LAYERS,), WIDTH))[0]
    assert torch.equal(found[:, :-1], changed[:, :-1])
    assert not torch.equal(found[:, -1], changed[:, -1])


@pytest.mark.parametrize("length", [20, WINDOWS_UP_TO + 1])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_attention_has_the_gradients_of_the_softmax_written_out(length: int, heads: int, groups: int) -> None:
    """Q, K and V lie in memory as the projections lay them."""
    generator = torch.Generator().manual_seed(heads)
    given = [
        torch.randn(2, length, count, 8, generator=generator, dtype=torch.float64) for count in (heads, groups, groups)
    ]
    query, key, value = (one.transpose(1, 2).requires_grad_() for one in given)
    wide = [one.repeat_interleave(heads // groups, 1) for one in (key, value)]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = (0.3 * query @ wide[0].transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1)
    expected = (shares @ wide[1]).transpose(1, 2)
    found = causal_attention(query, key, value, 0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (expected, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_norm_has_the_gradients_of_transformers_own(wanted: tuple[bool, bool]) -> None:
    """Of states and weight, or of one of them; in float32 to its last digits, in bfloat16 to those of its states."""
    norm = toy_model().model.norm
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        sources = [
            one.requires_grad_() for one, is_wanted in zip((x, norm.to(dtype).weight), wanted, strict=True) if is_wanted
        ]
        norm.weight.requires_grad_(wanted[1])
        results = [
            [made, *torch.autograd.grad((made * weights).sum(), sources)] for made in (norm(x), rms_norm(norm, x))
        ]
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_pass_has_the_gradients_of_transformers_own(family: str) -> None:
    """Rotation, norms, attention and FFN in one, with two heads to a head of K and V."""
    model, tokens = toy_model(family), toy_tokens()
    found = []
    for run in (lambda: model(tokens).logits, lambda: logits(model, tokens, SubModels((LAYERS,), WIDTH))[0]):
        model.zero_grad()
        run().square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_larger_sub_models_hold_the_smaller_ones() -> None:
    """What lies beyond a prefix neither changes its result nor gets a gradient from it."""
    model, tokens = toy_model(), toy_tokens()
    chosen = SubModels((2,), 20)
    before = logits(model, tokens, chosen)
    before.square().mean().backward()  # type: ignore[no-untyped-call]
    for index, layer in enumerate(model.model.layers):
        gate, down = layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight
        if index < 2:
            assert gate.grad[:20].any(1).all()
            assert not gate.grad[20:].any()
            assert not down.grad[:, 20:].any()
        else:
            assert gate.grad is None
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate_proj.weight[20:] += 1
            layer.mlp.down_proj.weight[:, 20:] -= 1
            if index >= 2:
                layer.self_attn.q_proj.weight += 1
        assert torch.equal(logits(model, tokens, chosen), before)
        assert not torch.equal(logits(model, tokens, SubModels((2,), 21)), before)
        assert not torch.equal(logits(model, tokens, SubModels((3,), 20)), before)


def test_a_skipped_layer_adds_nothing() -> None:
    model, tokens = toy_model(), toy_tokens()
    found = logits(model, tokens, SubModels((LAYERS,), WIDTH, frozenset({1})))[0]
    without = copy.deepcopy(model)
    del without.model.layers[1]
    without.config.num_hidden_layers = LAYERS - 1
    for index, layer in enumerate(without.model.layers):
        layer.self_attn.layer_idx = index
    assert torch.allclose(found, without(tokens).logits, atol=2e-5)


def test_layers_computed_again_give_the_same_gradients() -> None:
    model, tokens = toy_model(), toy_tokens()
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        exit_states(model, tokens, SubModels((2, LAYERS), 30), checkpointed).square().mean().backward()  # type: ignore[no-untyped-call]
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_model_stays_what_it_is() -> None:
    model = toy_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exit_states(model, toy_tokens(), SubModels((1, 2), 10))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_family_is_refused() -> None:
    model = toy_model()
    model.config.model_type = "gpt2"
    with pytest.raises(SortingError, match="gpt2"):
        check_family(model)
