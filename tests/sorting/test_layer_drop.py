"""Layer and sub-layer dropping without search, against the formulas worked out another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import SubModel
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.layer_drop import (
    Similarity,
    drop_layers,
    llm_drop,
    measure_similarity,
    narrow_layers,
    unified_layer_skipping,
    zd,
)
from sortserve.sorting.texts import Domain, batches

ALIKE = Similarity((0.1, 0.9, 0.5, 0.8), (0.95, 0.2, 0.7, 0.3), (0.3, 0.8, 0.6, 0.4))


def kept_layers(submodel: SubModel) -> list[int]:
    assert submodel.skip_attention == tuple(layer for layer, width in enumerate(submodel.widths) if width == 0)
    return [layer for layer, width in enumerate(submodel.widths) if width > 0]


@pytest.mark.parametrize(
    ("num_layers", "keep", "kept"),
    [
        (24, 24, list(range(24))),
        (24, 18, [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23]),
        (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
        (30, 20, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]),
        (4, 2, [0, 3]),
    ],
)
def test_unified_layer_skipping_spreads(num_layers: int, keep: int, kept: list[int]) -> None:
    """Not the released formula, which for 30 layers and 20 kept leaves out one block, 19 to 28."""
    found = unified_layer_skipping(num_layers, 64, keep)
    assert kept_layers(found) == kept
    assert found.depth == num_layers
    with pytest.raises(SortingError, match=str(num_layers)):
        unified_layer_skipping(num_layers, 64, num_layers + 1)


def test_similarities_are_cosines_of_inputs_and_outputs(
    toy: Decoder, toy_folder: Path, toy_domains: list[Domain]
) -> None:
    """Against transformers' own layers, text by text without padding."""
    model = AutoModelForCausalLM.from_pretrained(toy_folder, dtype=torch.float32)
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        for name, module in (("in", layer.input_layernorm), ("mid", layer.post_attention_layernorm)):
            module.register_forward_pre_hook(
                lambda _, args, key=(number, name): seen.setdefault(key, []).append(args[0][0])
            )
        layer.register_forward_hook(
            lambda _, args, out, key=(number, "out"): seen.setdefault(key, []).append(
                (out[0] if isinstance(out, tuple) else out).view(-1, 48)
            )
        )
    with torch.inference_mode():
        for domain in toy_domains:
            for text in domain.texts:
                model(torch.tensor([text.tokens]))
    found = measure_similarity(toy, [batch for domain in toy_domains for batch in batches(domain, 64)])
    for layer in range(6):
        start, middle, end = (torch.cat(seen[layer, name]) for name in ("in", "mid", "out"))
        for told, (before, after) in zip(
            (found.attention[layer], found.ffn[layer], found.layer[layer]),
            ((start, middle), (middle, end), (start, end)),
            strict=True,
        ):
            assert told == pytest.approx(float(torch.cosine_similarity(before, after).mean()), abs=1e-5)
    assert found.lim == tuple(-value for value in found.layer)


def test_llm_drop_takes_the_most_alike() -> None:
    assert llm_drop(ALIKE, 64, attention=2) == SubModel.make(4, 64, [1, 3])
    assert llm_drop(ALIKE, 64, ffn=2) == SubModel.make(4, 64, [], [0, 2])
    assert llm_drop(ALIKE, 64, attention=1, ffn=1) == SubModel.make(4, 64, [1], [0])
    assert llm_drop(ALIKE, 64, joint=3) == SubModel.make(4, 64, [1, 3], [0]), "0.95, 0.9, 0.8 of both kinds"
    assert llm_drop(ALIKE, 64) == SubModel.make(4, 64)
    with pytest.raises(SortingError, match=r"9 .* \[0, 8\]"):
        llm_drop(ALIKE, 64, joint=9)


def test_lim_drops_and_narrows_the_least_important() -> None:
    assert kept_layers(drop_layers(ALIKE.lim, 64, 2)) == [0, 3], "layers 1 and 2 change their input least"
    assert narrow_layers(ALIKE.lim, (16, 32, 64), 4 * 64).widths == (64,) * 4
    assert narrow_layers(ALIKE.lim, (16, 32, 64), 4 * 64 - 80).widths == (64, 16, 32, 64)
    with pytest.raises(SortingError, match="64"):
        narrow_layers(ALIKE.lim, (16, 64), 63)


def test_zd_counts_weights_far_above_the_mean(toy: Decoder) -> None:
    found = zd(toy)
    for layer, told in zip(toy.layers, found, strict=True):
        flat = np.concatenate(
            [m.double().numpy().ravel() for m in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)]
        )
        assert told == pytest.approx(-float(((flat - flat.mean()) / flat.std() > 1).mean()), abs=1e-4)
    toy.layers[3].down[:] = 0.0
    toy.layers[3].down[0, :9] = 50.0  # a few outliers: a small share far above the mean, so it is the most important
    assert max(range(6), key=zd(toy).__getitem__) == 3
