"""Figures against transformers, and how a ladder comes of them."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.ladder_file import Measured, Quality, Score
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.sorting.compare import Sums, Variant, compare
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.measuring import Candidate, measure
from sortserve.sorting.plot import quality_plot
from sortserve.sorting.quality import Result, build_ladder, by_loss, by_score, drop_dominated, not_monotone
from sortserve.sorting.texts import Domain

SHAPE = ModelShape(6, 48, 64, 6, 2, 8, 101)
FULL = SubModel.full(SHAPE)


def reference(folder: Path, depth: int, width: int) -> Any:
    """A sub-model in transformers: the first layers, and of each FFN the first neurons."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = model.model.layers[:depth]
    model.config.num_hidden_layers = depth
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight = torch.nn.Parameter(linear.weight[:width].clone())
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :width].clone())
    return model


@torch.inference_mode()
def test_figures_are_those_of_transformers(toy: Decoder, toy_folder: Path, toy_domains: list[Domain]) -> None:
    """Text by text without padding; small batches here, so that some are padded and others are not."""
    full, narrow = reference(toy_folder, 6, 64), reference(toy_folder, 4, 32)
    [found] = compare(toy, toy_domains, [Variant(SubModel.make(4, 32))], batch_tokens=50)
    for domain in toy_domains:
        sums = found[domain.name]
        for place, text in enumerate(domain.texts):
            tokens = torch.tensor([text.tokens])
            scored = slice(text.num_prompt - 1, -1)
            ours, whole = (model(tokens).logits[0, scored].log_softmax(-1) for model in (narrow, full))
            targets = tokens[0, text.num_prompt :]
            assert sums.tokens[place] == len(targets) == text.num_scored
            assert sums.loss[place] == pytest.approx(float(-ours.gather(1, targets[:, None]).sum()), rel=1e-4)
            assert sums.agreed[place] == int((ours.argmax(-1) == whole.argmax(-1)).sum())
            assert sums.kl[place] == pytest.approx(float((whole.exp() * (whole - ours)).sum()), rel=1e-3)


def test_means_and_intervals() -> None:
    """The mean is over tokens, not over texts; the interval is that of drawing texts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 100, 40).astype(float)
    means = rng.normal(2.0, 0.5, 40)
    figures = Sums(means * tokens, tokens, 0 * tokens, tokens).figures()
    assert figures.loss.value == pytest.approx(float((means * tokens).sum() / tokens.sum()), abs=1e-6)
    spread = (
        1.96 * float(np.sqrt((((means - figures.loss.value) * tokens) ** 2).sum())) / tokens.sum()
    )  # ratio estimator
    assert figures.loss.high - figures.loss.low == pytest.approx(2 * spread, rel=0.15)
    assert (figures.agreement.low, figures.agreement.value, figures.agreement.high) == (1.0, 1.0, 1.0)
    assert figures.kl.value == 0.0


# ---- quality


def sums(loss: float, num_texts: int = 5) -> Sums:
    tokens = np.full(num_texts, 10.0)
    return Sums(loss * tokens, tokens, tokens, tokens)


def result(submodel: SubModel, *losses: float, scores: dict[str, float] | None = None, method: str = "") -> Result:
    told = {
        task: Score(value, max(0.0, value - 0.1), min(1.0, value + 0.1), 50) for task, value in (scores or {}).items()
    }
    return Result(submodel, method, {f"domain{n}": sums(loss) for n, loss in enumerate(losses)}, told)


def test_quality_by_loss_is_the_mean_gap_of_domains() -> None:
    quality = by_loss({"a": sums(2.5), "b": sums(1.1)}, {"a": sums(2.0), "b": sums(1.0)})
    assert quality.value == pytest.approx(math.exp(-(0.5 + 0.1) / 2), abs=1e-6)
    assert quality.low == quality.high == quality.value, "all texts alike"
    assert by_loss({"a": sums(1.0)}, {"a": sums(2.0)}).value == 1.0, "no better than the full model"


def test_quality_by_a_task_is_the_share_of_the_full_score() -> None:
    assert by_score(Score(0.3, 0.2, 0.4, 50), Score(0.6, 0.5, 0.7, 50)) == Quality(0.5, 0.333333, 0.666667)
    with pytest.raises(SortingError, match="scores 0"):
        by_score(Score(0.3, 0.2, 0.4, 50), Score(0.0, 0.0, 0.1, 50))


HALF = SubModel.make(6, 32)


@pytest.mark.parametrize(
    ("narrow", "degraded"),
    [
        (result(HALF, 2.6, 2.6), False),
        (result(HALF, 2.0, 2.75), True),  # one domain lost more than half, though the mean did not
        (result(HALF, 2.1, 2.1, scores={"gsm8k": 0.3}), False),
        (result(HALF, 2.1, 2.1, scores={"gsm8k": 0.29}), True),
    ],
)
def test_degraded_is_under_half_of_the_full_model_on_some_measure(narrow: Result, degraded: bool) -> None:
    full = result(FULL, 2.0, 2.0, scores={"gsm8k": 0.6})
    ladder = build_ladder(SHAPE, [narrow, full], None)
    assert [entry.degraded for entry in ladder.entries] == [degraded, False]


def test_a_task_that_the_full_model_fails_degrades_nothing() -> None:
    ladder = build_ladder(SHAPE, [result(HALF, 2.0, scores={"x": 0.0}), result(FULL, 2.0, scores={"x": 0.0})], None)
    assert not ladder.entries[0].degraded


def test_quality_names_what_was_measured() -> None:
    results = [result(HALF, 2.0, scores={"gsm8k": 0.3}), result(FULL, 2.0, scores={"gsm8k": 0.6})]
    assert build_ladder(SHAPE, results, None, quality="gsm8k").entries[0].quality == Quality(0.5, 0.333333, 0.666667)
    with pytest.raises(SortingError, match="'arc' was not measured; there are: loss, gsm8k"):
        build_ladder(SHAPE, results, None, quality="arc")
    with pytest.raises(SortingError, match="full model was not measured"):
        build_ladder(SHAPE, results[:1], None)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 6)), min_size=1, max_size=12, unique_by=lambda one: one[0])
)
def test_dominance_and_monotony(points: list[tuple[int, int]]) -> None:
    """Against the definition: what stays is beaten by nothing that costs no more; what goes is beaten by something."""
    entries = [
        Entry(f"w{width}", SubModel.make(6, width), Quality(tenth / 10)) for width, tenth in points if width < 64
    ]
    entries.append(Entry("d6", FULL, Quality(1.0)))
    kept = drop_dominated(SHAPE, entries)
    costs = {entry.id: entry.submodel.cost(SHAPE) for entry in entries}
    values = {entry.id: entry.quality.value for entry in entries if entry.quality is not None}
    for entry in entries:
        beaten = any(
            other is not entry and costs[other.id] <= costs[entry.id] and values[other.id] >= values[entry.id]
            for other in entries
        )
        assert (entry in kept) == (not beaten or entry.id == "d6")
    ladder = Ladder.of(SHAPE, kept)
    assert not_monotone(ladder) == []
    everything = Ladder.of(SHAPE, entries)
    worse = [
        (a.id, b.id)
        for a, b in zip(everything.entries, everything.entries[1:], strict=False)
        if values[a.id] >= values[b.id] and not (b.id == "d6" and values[a.id] == 1.0)
    ]
    assert not_monotone(everything) == worse


def test_no_degraded_entry_above_a_sound_one() -> None:
    """`auto` may choose anything above the smallest sound entry."""
    bad = [Entry(f"w{width}", SubModel.make(6, width), Quality(width / 100), True) for width in (8, 40)]
    sound = Entry("w20", SubModel.make(6, 20), Quality(0.3))
    kept = drop_dominated(SHAPE, [*bad, sound, Entry("d6", FULL, Quality(1.0))])
    assert [entry.id for entry in kept] == ["w8", "w20", "d6"]


def test_measuring_a_model_from_candidates_to_a_file(toy: Decoder, toy_domains: list[Domain], tmp_path: Path) -> None:
    bad = SubModel.make(6, [1, 64, 64, 64, 64, 64])
    candidates = [Candidate(SubModel.make(6, 60)), Candidate(SubModel.make(6, 48), "widths"), Candidate(bad, "widths")]
    found = measure(toy, toy_domains, candidates, pairs=2)
    ladder = found.ladder
    assert not_monotone(ladder) == []
    assert {entry.submodel for entry in (*ladder.entries, *found.left_out)} >= {one.submodel for one in candidates}
    full = ladder.entries[-1]
    assert full.quality == Quality(1.0, 1.0, 1.0)
    assert full.domains["plain"].kl.value == 0.0
    assert full.domains["plain"].agreement.value == 1.0
    assert isinstance(ladder.measured, Measured)
    assert ladder.measured.data_sha256 == {domain.name: domain.digest for domain in toy_domains}
    assert ladder.measured.tokens == sum(domain.num_scored for domain in toy_domains)
    assert {(pair.prompt, pair.answer) for pair in ladder.pairs} >= {
        (entry.id, full.id) for entry in ladder.entries[:-1][:1]
    }
    assert all(set(pair.domains) == {"asked"} for pair in ladder.pairs), "only texts with prompts"
    found.write(tmp_path / "ladder.json", "A & B")
    assert Ladder.load(tmp_path / "ladder.json", toy.config.shape) == ladder
    drawn = ElementTree.parse(tmp_path / "ladder.svg").getroot()
    circles = [node for node in drawn.iter() if node.tag.endswith("circle")]
    assert len(circles) == len(ladder.entries) + len(found.left_out)


@torch.inference_mode()
def test_pairs_run_prompt_and_answer_on_their_own(toy: Decoder, toy_domains: list[Domain]) -> None:
    narrow = SubModel.make(6, 16)
    same, mixed, full = compare(toy, toy_domains[1:], [Variant(narrow, narrow), Variant(FULL, narrow), Variant(FULL)])
    [throughout] = compare(toy, toy_domains[1:], [Variant(narrow)])
    np.testing.assert_allclose(same["asked"].loss, throughout["asked"].loss, rtol=1e-4)
    assert full["asked"].kl.sum() == pytest.approx(0.0, abs=1e-4)
    assert 0 < mixed["asked"].kl.sum() < same["asked"].kl.sum()


def test_a_plot_places_points_by_cost_and_quality() -> None:
    entries = [Entry("d6-w50", HALF, Quality(0.5, 0.4, 0.6)), Entry("d6", FULL, Quality(1.0))]
    drawn = ElementTree.fromstring(quality_plot(Ladder.of(SHAPE, entries)))
    low, full = [node for node in drawn.iter() if node.tag.endswith("circle")]
    assert float(low.attrib["cx"]) < float(full.attrib["cx"])
    assert float(low.attrib["cy"]) > float(full.attrib["cy"])
