"""The order of FFN neurons: what it leaves as it is, and that it tells which neurons matter."""

import pytest
import torch
from scipy.stats import spearmanr

from sortserve.engine.submodel import SubModel
from sortserve.sorting.compare import kl_divergence
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.importance import measure_importance
from sortserve.sorting.texts import Batch, Domain, Text, batches


def data(num_texts: int, length: int = 32, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    texts = tuple(
        Text(tuple(torch.randint(0, 101, (length,), generator=generator).tolist()), 1) for _ in range(num_texts)
    )
    return list(batches(Domain("random", texts), 256))


@torch.inference_mode()
def outputs(decoder: Decoder, tokens: torch.Tensor, submodel: SubModel | None = None) -> torch.Tensor:
    hidden = decoder.run(tokens, submodel or SubModel.full(decoder.config.shape))
    return decoder.logits(hidden.view(-1, hidden.shape[-1]))


def test_sorting_leaves_the_full_model_as_it_is(toy: Decoder) -> None:
    [batch] = data(3)
    before = outputs(toy, batch.tokens)
    half = SubModel.make(6, 32)
    half_before = outputs(toy, batch.tokens, half)
    orders = measure_importance(toy, [batch]).order()
    assert any(order.tolist() != list(range(64)) for order in orders)
    for layer, order in zip(toy.layers, orders, strict=True):
        layer.permute_ffn(order)
    after = outputs(toy, batch.tokens)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert (after.argmax(-1) == before.argmax(-1)).all()
    assert not torch.allclose(outputs(toy, batch.tokens, half), half_before, atol=1e-2), "narrow ones do change"


def test_sorted_prefixes_are_nearer_to_the_full_model(toy: Decoder) -> None:
    held_out = data(8, seed=9)[0].tokens
    reference = outputs(toy, held_out).log_softmax(-1)

    def distance() -> float:
        narrow = outputs(toy, held_out, SubModel.make(6, 40)).log_softmax(-1)
        return float(kl_divergence(reference, narrow).mean())

    unsorted = distance()
    for layer, order in zip(toy.layers, measure_importance(toy, data(16)).order(), strict=True):
        layer.permute_ffn(order)
    found = distance()
    for layer in toy.layers:
        layer.permute_ffn(torch.arange(63, -1, -1))
    assert found < 0.8 * unsorted
    assert found < 0.7 * distance(), "the other end first"


def test_neurons_that_do_nothing_come_last(toy: Decoder) -> None:
    dead = [3, 17, 40]
    for layer in toy.layers:
        layer.down[:, dead[:2]] = 0  # written to nowhere
        layer.gate[dead[2]] = 0  # silu(0) = 0: never fires
    importance = measure_importance(toy, data(4))
    assert (importance.activation[:, dead] == 0).all()
    assert (importance.fisher[:, dead] == 0).all()
    for order in importance.order():
        assert set(order[-3:].tolist()) == set(dead)


def test_fisher_is_the_curvature_of_the_divergence(toy: Decoder) -> None:
    """Against brute force: weaken one neuron at a time by 5 %, and measure KL to the full model."""
    texts = data(64)
    fisher = measure_importance(toy, texts, seed=1).fisher[2]
    tokens = torch.cat([batch.tokens for batch in texts])
    reference = outputs(toy, tokens).log_softmax(-1)
    layer, weaker = toy.layers[2], 0.05
    measured = []
    for neuron in range(64):
        kept = layer.down[:, neuron].clone()
        layer.down[:, neuron] *= 1 - weaker
        measured.append(float(kl_divergence(reference, outputs(toy, tokens).log_softmax(-1)).mean()))
        layer.down[:, neuron] = kept
    predicted = weaker**2 / 2 * fisher
    assert spearmanr(predicted, measured).statistic > 0.9
    assert float(predicted.sum()) == pytest.approx(sum(measured), rel=0.35), "tokens of a text are taken as independent"


def test_batches_add_up_and_padding_counts_for_nothing(toy: Decoder) -> None:
    long, short = data(1, 32)[0], data(1, 12, seed=4)[0]
    texts = [Text(tuple(batch.tokens[0].tolist()), 1) for batch in (long, short)]
    [together] = batches(Domain("both", tuple(texts)), 256)
    padded = measure_importance(toy, [together]).activation
    apart = [measure_importance(toy, [batch]).activation for batch in (long, short)]
    expected = ((apart[0] ** 2 * 32 + apart[1] ** 2 * 12) / 44).sqrt()
    torch.testing.assert_close(padded, expected, rtol=1e-3, atol=1e-6)
