"""The order of FFN neurons: how much the model's answers change without each of them.

One pass forward and back over calibration text. Next tokens are drawn from the model's own distribution, so the mean
square of (activation x its gradient) is the diagonal of the Fisher information along each neuron: to second order, twice
the KL divergence from the full model that leaving the neuron out costs. No labels are needed.

The order is by its product with the energy that the neuron adds to the residual stream (mean square of the activation x
square of the norm of its column of `down`), which is known with less noise. On the 0.5B model, KL at 3/4 and at half
width, the mean of books, GSM8K and HumanEval, in nats: the product 0.25 and 0.81, Fisher alone 0.25 and 0.85, energy alone
0.28 and 0.85, norms of columns without any text 0.49 and 1.16.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.sorting.decoder import Decoder
from sortserve.sorting.texts import Batch

_LEAST = 1e-30  # of a neuron that never fires, before its logarithm


@dataclass(frozen=True)
class Importance:
    """Per layer and neuron, float32 [layers, width]: higher matters more."""

    fisher: Tensor  # nats per token
    activation: Tensor  # root mean square of activation x column norm

    def order(self) -> list[Tensor]:
        """Neurons of each layer, most important first."""
        both = self.fisher.clamp_min(_LEAST).log() + 2 * self.activation.clamp_min(_LEAST).log()
        return [scores.argsort(descending=True, stable=True) for scores in both]


def measure_importance(decoder: Decoder, data: Iterable[Batch], seed: int = 0) -> Importance:
    """One pass forward and back per batch; batches bound the memory: a layer keeps its activations until the way back."""
    shape = decoder.config.shape
    fisher = torch.zeros(shape.num_layers, shape.ffn_width)
    squares = torch.zeros(shape.num_layers, shape.ffn_width)
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 0
    for batch in data:
        real = batch.scored | batch.is_prompt

        def watch(layer: int, inner: Tensor, real: Tensor = real) -> Tensor:
            squares[layer] += inner.detach()[real].float().square().sum(0)

            def back(gradient: Tensor) -> None:
                fisher[layer] += (inner.detach()[real].float() * gradient[real].float()).square().sum(0)

            inner.register_hook(back)  # type: ignore[no-untyped-call]
            return inner

        with torch.enable_grad():
            hidden = decoder.embed(batch.tokens).requires_grad_()
            for layer in range(shape.num_layers):
                hidden = decoder.layer(layer, hidden, shape.ffn_width, watch=watch)
            _drawn_loss(decoder, hidden[real], generator).backward()  # type: ignore[no-untyped-call]
        num_tokens += int(real.sum())
    norms = torch.stack([layer.down.float().norm(dim=0) for layer in decoder.layers])
    return Importance(fisher / max(1, num_tokens), (squares / max(1, num_tokens)).sqrt() * norms)


def _drawn_loss(decoder: Decoder, hidden: Tensor, generator: torch.Generator, rows: int = 256) -> Tensor:
    """A number with the gradient, by the hidden states, of the sum of losses of tokens drawn from the model itself. It is
    worked out a few rows at a time, so that the vocabulary's logits never stand for all tokens at once."""
    gradients = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows].detach().requires_grad_()
        logits = decoder.logits(part)
        with torch.no_grad():
            # by inverting the distribution: torch.multinomial takes 3.6 ms a row of 150k tokens, as long as all layers
            below = logits.softmax(-1).cumsum(-1)
            where = below[:, -1:] * torch.rand(len(part), 1, generator=generator)
            drawn = torch.searchsorted(below, where)[:, 0].clamp_max(below.shape[1] - 1)
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        gradients[start : start + rows] = part.grad
    return (hidden * gradients).sum()
