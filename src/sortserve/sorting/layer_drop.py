"""Which layers or sub-layers to leave out, without search: Unified Layer Skipping, LLM-Drop, LIM and ZD.

- Unified Layer Skipping (arXiv 2404.06954): layers `round(linspace(0, L - 1, N))` stay, whatever the text. Not the
  released formula, which for small skips drops one block of neighbours.
- LLM-Drop (arXiv 2406.15786): sub-layers by mean cosine of x and x + f(norm(x)); the most alike go first. Attention,
  MLP, or both kinds in one order (joint).
- LIM (arXiv 2406.17415): layers by negative cosine of their input and output; the higher, the more important.
- ZD (same): layers by the share of weights with a z-score over 1; the smaller, the more important. Needs no text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import SubModel
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.texts import Batch


@dataclass(frozen=True)
class Similarity:
    """Mean cosines over calibration tokens, by layer: input against output of the attention with its residual, of the
    FFN with its own, and of the whole layer."""

    attention: tuple[float, ...]
    ffn: tuple[float, ...]
    layer: tuple[float, ...]

    @property
    def lim(self) -> tuple[float, ...]:
        """Layer importance by LIM, higher is more important."""
        return tuple(-value for value in self.layer)


def measure_similarity(decoder: Decoder, data: Iterable[Batch]) -> Similarity:
    """One pass of the full model."""
    shape = decoder.config.shape
    sums = torch.zeros(3, shape.num_layers, dtype=torch.float64)
    num_tokens = 0
    with torch.inference_mode():
        for batch in data:
            real = batch.scored | batch.is_prompt
            hidden = decoder.embed(batch.tokens)
            for layer in range(shape.num_layers):
                attended = hidden + decoder.attention(layer, hidden)
                out = attended + decoder.ffn(layer, attended, shape.ffn_width)
                for kind, (before, after) in enumerate(((hidden, attended), (attended, out), (hidden, out))):
                    cosine = F.cosine_similarity(before[real].float(), after[real].float(), dim=-1)
                    sums[kind, layer] += cosine.double().sum()
                hidden = out
            num_tokens += int(real.sum())
    means = (sums / max(1, num_tokens)).tolist()
    return Similarity(tuple(means[0]), tuple(means[1]), tuple(means[2]))


def zd(decoder: Decoder) -> tuple[float, ...]:
    """Layer importance by ZD: minus the share of a layer's weights that lie over one deviation above their mean."""
    shares = []
    for layer in decoder.layers:
        matrices = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
        count = sum(matrix.numel() for matrix in matrices)
        mean = sum(float(matrix.sum(dtype=torch.float64)) for matrix in matrices) / count
        spread = sum(float((matrix.float() - mean).square().sum(dtype=torch.float64)) for matrix in matrices) / count
        above = sum(int(_over(matrix, mean + spread**0.5)) for matrix in matrices)
        shares.append(-above / count)
    return tuple(shares)


def unified_layer_skipping(num_layers: int, ffn_width: int, keep: int) -> SubModel:
    """`keep` whole layers, spread evenly, the first and the last among them. Raises SortingError for no such number."""
    if not 2 <= keep <= num_layers:
        raise SortingError(f"{keep} layers to keep, must be in [2, {num_layers}]")
    kept = {round(place) for place in torch.linspace(0, num_layers - 1, keep, dtype=torch.float64).tolist()}
    dropped = [layer for layer in range(num_layers) if layer not in kept]
    return SubModel.make(num_layers, ffn_width, dropped, dropped)


def llm_drop(similarity: Similarity, ffn_width: int, *, attention: int = 0, ffn: int = 0, joint: int = 0) -> SubModel:
    """The most alike sub-layers dropped in one shot: so many attentions, so many FFNs, or so many of both in one order."""
    num_layers = len(similarity.attention)
    most = {"attention": num_layers, "ffn": num_layers, "joint": 2 * num_layers}
    for name, count in (("attention", attention), ("ffn", ffn), ("joint", joint)):
        if not 0 <= count <= most[name]:
            raise SortingError(f"{count} sub-layers to drop ({name}), must be in [0, {most[name]}]")
    if joint:
        both = [*similarity.attention, *similarity.ffn]
        chosen = _highest(both, joint)
        no_attention = [place for place in chosen if place < num_layers]
        no_ffn = [place - num_layers for place in chosen if place >= num_layers]
    else:
        no_attention, no_ffn = _highest(similarity.attention, attention), _highest(similarity.ffn, ffn)
    return SubModel.make(num_layers, ffn_width, no_attention, no_ffn)


def drop_layers(importance: Sequence[float], ffn_width: int, drop: int) -> SubModel:
    """The least important layers (by LIM or ZD) dropped whole."""
    dropped = _highest([-value for value in importance], drop)
    return SubModel.make(len(importance), ffn_width, dropped, dropped)


def narrow_layers(importance: Sequence[float], widths: Sequence[int], budget: int) -> SubModel:
    """LIM's and ZD's own rule, with widths in place of bits: from the least important layer on, each goes to the narrowest
    of `widths` until `budget` neurons are left."""
    ascending = sorted(widths)
    chosen = [ascending[-1]] * len(importance)
    for layer in sorted(range(len(importance)), key=importance.__getitem__):
        for width in reversed(ascending):
            if sum(chosen) <= budget:
                return SubModel.make(len(chosen), chosen)
            chosen[layer] = width
    if sum(chosen) > budget:
        raise SortingError(f"a budget of {budget} neurons, the narrowest widths come to {sum(chosen)}")
    return SubModel.make(len(chosen), chosen)


def _highest(values: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda place: -values[place])[:count])


def _over(matrix: Tensor, limit: float) -> Tensor:
    return (matrix.float() > limit).sum()
