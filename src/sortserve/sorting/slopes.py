"""What each layer loses at each width, from the slope of KL divergence where all layers are narrow together.

Losses measured with one layer narrowed alone, all others whole, do not say what matters where every layer is narrow: on
the 0.5B model what they allocated was no better than one width. Here all layers run at one width a little under the budget,
and one pass back gives the derivative of KL by every neuron beyond it, on as much text as importance looks at. Near there
KL is nearly a quadratic form of what is left out (the slopes of the neurons beyond sum to 2.4 times KL, where 2 would be
exact; those of the neurons that run to nearly nothing), so half of a slope is what a neuron's absence costs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sortserve.engine.submodel import SubModel
from sortserve.sorting.compare import kl_divergence, predicting
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.texts import Batch


class Slopes:
    """Derivatives of KL from the full model, over every `stride`-th scored row of some texts: the head is a quarter and
    more of a pass, and neighbouring rows tell much the same."""

    def __init__(self, decoder: Decoder, data: Iterable[Batch], stride: int = 2) -> None:
        self._decoder = decoder
        self._texts: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, places of rows, the full model's states there
        full = SubModel.full(decoder.config.shape)
        with torch.no_grad():
            for batch in data:
                places = predicting(batch).nonzero()[::stride]
                hidden = decoder.run(batch.tokens, full)[places[:, 0], places[:, 1]]
                self._texts.append((batch.tokens, places, hidden))
        self.num_rows = sum(len(places) for _, places, _ in self._texts)

    def at(self, width: int) -> Tensor:
        """By how much KL falls per unit of every neuron, float32 [layers, neurons] in nats, where all layers run their
        first `width` neurons: a pass forward and back of the whole model, the neurons beyond multiplied by 0."""
        shape = self._decoder.config.shape
        slopes = torch.zeros(shape.num_layers, shape.ffn_width)
        mask = (torch.arange(shape.ffn_width) < width).to(self._decoder.dtype)

        def watch(layer: int, inner: Tensor) -> Tensor:
            runs = inner * mask

            def back(gradient: Tensor) -> None:
                slopes[layer] -= (inner.detach().float() * gradient.float()).sum((0, 1))

            runs.register_hook(back)  # type: ignore[no-untyped-call]
            return runs

        for tokens, places, reference in self._texts:
            with torch.enable_grad():
                hidden = self._decoder.embed(tokens).requires_grad_()
                for layer in range(shape.num_layers):
                    hidden = self._decoder.layer(layer, hidden, shape.ffn_width, watch=watch)
                loss = _kl(self._decoder, hidden[places[:, 0], places[:, 1]], reference)
                loss.backward()  # type: ignore[no-untyped-call]
        return slopes / max(1, self.num_rows)

    def losses(self, widths: Sequence[int]) -> list[list[float]]:
        """Nats per token that each layer loses at each of the ascending `widths`, all others at the first of them; the
        last one is the full width: [layers][widths].

        What a layer loses in all is known better than where, so each curve is half its own and half the mean layer's, at its
        own height: on the 0.5B model KL of what was allocated at 55 % of the neurons was 0.67 without that, 0.59 with it.
        """
        assert widths[-1] == self._decoder.config.shape.ffn_width, widths
        lost = self.at(widths[0]).double() / 2
        own = torch.stack([lost[:, width:].sum(1) for width in widths], 1)
        mean = own.mean(0)
        height = own[:, :1] / mean[0].clamp_min(1e-12)
        found: list[list[float]] = ((own + height * mean) / 2).tolist()
        return found


def _kl(decoder: Decoder, hidden: Tensor, reference: Tensor, rows: int = 128) -> Tensor:
    """A number with the gradient, by the hidden states, of the sum of KL from what the head makes of `reference`. It is
    worked out a few rows at a time, so that the vocabulary's logits never stand for all rows at once."""
    gradients = torch.empty_like(hidden)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows].detach().requires_grad_()
        with torch.no_grad():
            wanted = decoder.logits(reference[start : start + rows]).log_softmax(-1)
        kl_divergence(wanted, decoder.logits(part).log_softmax(-1)).sum().backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        gradients[start : start + rows] = part.grad
    return (hidden * gradients).sum()
