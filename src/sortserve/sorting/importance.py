"""The order of FFN neurons: how much the model's answers change without each of them.

One pass forward and back over calibration text. Next tokens are drawn from the model's own distribution, so the mean
square of (activation x its gradient) is the diagonal of the Fisher information along each neuron: to second order, twice
the KL divergence from the full model that leaving the neuron out costs. No labels are needed, and figures of
different layers compare with one another, which norms of weights and activations do not.

`by_activation` needs no gradients: root mean square of the activation times the norm of its column of `down`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.sorting.decoder import Decoder
from sortserve.sorting.texts import Batch

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Importance:
    """Per layer and neuron, float32 [layers, width]: higher matters more."""

    fisher: Tensor  # nats per token
    activation: Tensor  # root mean square of activation x column norm

    def order(self) -> list[Tensor]:
        """Neurons of each layer, most important first."""
        return [scores.argsort(descending=True, stable=True) for scores in self.fisher]

    def sorted_by(self, order: Sequence[Tensor]) -> "Importance":
        """The same figures after the neurons were permuted."""
        pick = torch.stack(list(order))
        return Importance(self.fisher.gather(1, pick), self.activation.gather(1, pick))


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

            inner.register_hook(back)
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
    """Sum of the losses of tokens drawn from the model itself. Its gradient by the hidden states is worked out a few
    rows at a time, so that the vocabulary's logits never stand for all tokens at once."""
    gradients = torch.empty_like(hidden)
    total = 0.0
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows].detach().requires_grad_()
        logits = decoder.logits(part)
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        gradients[start : start + rows] = part.grad
        total += float(loss.detach())
    # the value is the loss, the gradient is that of the sum above
    return (hidden * gradients).sum() + (total - float((hidden.detach() * gradients).sum()))


def by_weights(decoder: Decoder) -> Tensor:
    """Importance without data, [layers, width]: the norm of each neuron's column of `down`."""
    return torch.stack([layer.down.float().norm(dim=0) for layer in decoder.layers])
