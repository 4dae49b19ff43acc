"""Slopes of KL by neuron, against differences."""

import pytest
import torch

from sortserve.engine.submodel import SubModel
from sortserve.sorting import widths
from sortserve.sorting.compare import kl_divergence
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.slopes import Slopes
from sortserve.sorting.texts import Batch, Domain, Text, batches


def kl(decoder: Decoder, data: list[Batch], layer: int, neuron: int, factor: float, stride: int) -> float:
    """Mean KL from the full model where all layers run 40 neurons, one of them `neuron`'s share of another."""
    total, rows = 0.0, 0
    for batch in data:
        places = [(i, t - 1) for i, t in batch.scored.nonzero().tolist()][::stride]

        def watch(number: int, inner: torch.Tensor) -> torch.Tensor:
            mask = (torch.arange(64) < 40).to(inner.dtype)
            if number == layer:
                mask[neuron] = factor
            return inner * mask

        full, hidden = decoder.run(batch.tokens, SubModel.full(decoder.config.shape)), decoder.embed(batch.tokens)
        for number in range(6):
            hidden = decoder.layer(number, hidden, 64, watch=watch)
        for i, t in places:
            reference, own = (decoder.logits(x[i, t][None]).log_softmax(-1) for x in (full, hidden))
            total += float(kl_divergence(reference, own).double())
        rows += len(places)
    return total / rows


@pytest.mark.parametrize("stride", [1, 2])
def test_a_slope_is_what_kl_falls_by(toy: Decoder, toy_domains: list[Domain], stride: int) -> None:
    """Also of a neuron that runs; a text with a prompt and padding are among them."""
    data = [batch for domain in toy_domains for batch in batches(domain, 64)]
    slopes = Slopes(toy, data, stride).at(40)
    with torch.inference_mode():
        for layer, neuron, value in ((0, 45, 0.0), (3, 63, 0.0), (5, 41, 0.0), (2, 7, 1.0)):
            up, down = (kl(toy, data, layer, neuron, value + step, stride) for step in (0.01, -0.01))
            assert float(slopes[layer, neuron]) == pytest.approx((down - up) / 0.02, rel=0.05, abs=1e-4)


def test_losses_are_half_of_the_slopes_beyond_and_drawn_to_the_mean(toy: Decoder, toy_domains: list[Domain]) -> None:
    slopes = Slopes(toy, list(batches(toy_domains[0], 64)))
    losses = torch.tensor(slopes.losses((40, 52, 64)))
    beyond = slopes.at(40)[:, 40:]
    torch.testing.assert_close(losses[:, 0], beyond.sum(1) / 2)
    narrower = beyond[:, 12:].sum(1) / 2
    drawn = narrower.mean() * losses[:, 0] / losses[:, 0].mean()
    torch.testing.assert_close(losses[:, 1], (narrower + drawn) / 2)
    assert losses[:, 2].tolist() == [0.0] * 6


def test_a_layer_that_matters_less_is_narrowed(toy: Decoder, toy_domains: list[Domain]) -> None:
    """Layer 2's neurons hardly add to anything, so the others get what it has."""
    toy.layers[2].down *= 0.01
    losses = Slopes(toy, list(batches(toy_domains[0], 64))).losses((32, 40, 48, 56, 64))
    found = widths.allocate(losses, (32, 40, 48, 56, 64), 6 * 48)
    assert found.widths[2] == 32
    assert sum(found.widths) == 6 * 48


def test_the_first_texts_of_a_domain() -> None:
    domain = Domain("plain", tuple(Text(tuple(range(length)), 1) for length in (9, 5, 7)), "x")
    assert domain.split(9) == (Domain("plain", domain.texts[:2], "x"), Domain("plain", domain.texts[2:], "x"))
    assert domain.split(8)[0].texts == domain.texts[:1]
    assert domain.split(10**6) == (domain, Domain("plain", (), "x"))
