"""The ladder: its file, strictly read; its order, exits and floors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.errors import LadderError, NotFoundError
from sortserve.engine.ladder import Entry, Figures, Ladder, Measured, Pair, Quality, Score
from sortserve.engine.ladder_file import Estimate
from sortserve.engine.settings import SettingsTable
from sortserve.engine.submodel import ModelShape, SubModel
from tests.engine.small import SHAPE, small_ladder
from tests.engine.test_submodel import submodels


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    chosen = draw(st.lists(submodels(), max_size=8, unique=True))
    full = SubModel.full(SHAPE)
    entries: list[Entry] = []
    for number, submodel in enumerate(chosen):
        quality = draw(st.none() | st.floats(0, 1).map(lambda value: Quality(value, value / 2, (1 + value) / 2)))
        name = submodel.name(SHAPE) if draw(st.booleans()) else None
        if name is None or submodel == full or name in [entry.id for entry in entries]:
            name = f"entry {number}"
        entries.append(Entry(name, submodel, quality, draw(st.booleans()) and submodel != full))
    measured = draw(
        st.none() | st.builds(Measured, st.text(max_size=5), st.text(max_size=5), tokens=st.integers(0, 99))
    )
    return Ladder.of(SHAPE, entries, measured)


FIGURES = Figures(Estimate(2.5, 2.0, 3.0), Estimate(0.5, 0.25, 0.75), Estimate(0.125, 0.0, 0.5), 7)


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    entries = [
        Entry(
            "narrow", SubModel.make(6, 32), Quality(0.5), True, {"books": FIGURES}, {"gsm8k": Score(0.5, 0, 1, 9)}, 1.5
        ),
        Entry("dropped", SubModel.make(6, 64, [2], [4]), Quality(0.75), method="evopress"),
    ]
    measured = Measured(
        "loss", "books", "command", 7, "loss", {"books": "00ff"}, {"torch": "2"}, "a machine", "2026-11-26", 2.5
    )
    ladder = Ladder.of(SHAPE, entries, measured, [Pair("narrow", "d6", {"books": FIGURES})])
    ladder.dump(tmp_path / "ladder.json")
    assert Ladder.load(tmp_path / "ladder.json", SHAPE) == ladder
    assert hash(ladder.entries[0]) == hash(ladder.entries[0])


def file_of(**changed: Any) -> dict[str, Any]:
    entries = [{"depth": 6, "width": 64}, {"depth": 3, "width": 32}]
    known = {"format": "sortserve-ladder", "version": 1, "num_layers": 6, "ffn_width": 64, "entries": entries}
    return {key: value for key, value in (known | changed).items() if value is not None}


def load(folder: Path, content: Any) -> Ladder:
    path = folder / "ladder.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return Ladder.load(path, SHAPE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ladder=ladders())
def test_what_is_dumped_is_loaded(tmp_path: Path, ladder: Ladder) -> None:
    path = tmp_path / "ladder.json"
    ladder = replace(ladder, layer_importance=tuple(-0.5 * layer for layer in range(SHAPE.num_layers)))
    ladder.dump(path)
    assert Ladder.load(path, SHAPE) == ladder
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("sortserve-ladder", 2)


@given(ladders())
def test_order_exits_and_bounds(ladder: Ladder) -> None:
    costs = ladder.costs
    assert list(costs) == [entry.submodel.cost(SHAPE) for entry in ladder.entries]
    assert list(costs) == sorted(costs)
    assert ladder.full == len(ladder.entries) - 1
    assert ladder.entries[ladder.full].submodel == SubModel.full(SHAPE)
    assert ladder.exits == tuple(sorted({entry.submodel.depth for entry in ladder.entries}))
    assert ladder.exits[-1] == SHAPE.num_layers
    assert ladder.bounds == (0, *ladder.exits)
    assert ladder.num_segments == len(ladder.exits)
    for place, entry in enumerate(ladder.entries):
        assert ladder.place(entry.id) == place


def test_entries_come_from_the_cheapest_to_the_full_model(tmp_path: Path) -> None:
    ladder = load(tmp_path, file_of())
    assert [entry.id for entry in ladder.entries] == ["d3-w50", "d6"]
    without_full = load(tmp_path, file_of(entries=[{"depth": 3, "width": 32}]))
    assert [entry.id for entry in without_full.entries] == ["d3-w50", "d6"]
    assert without_full.entries[1].quality == Quality(1.0)


def test_names_that_the_file_leaves_out(tmp_path: Path) -> None:
    entries = [
        {"depth": 3, "width": [64, 32, 16]},
        {"depth": 6, "width": 64, "skip_attention": [2]},
        {"depth": 6, "width": 64, "skip_ffn": [1], "id": "mine"},
    ]
    ladder = load(tmp_path, file_of(entries=entries))
    assert {entry.id for entry in ladder.entries} == {"d3-w100-s0", "d6-w100-s1", "mine", "d6"}
    assert ladder.entries[ladder.place("mine")].submodel.widths == (64, 0, 64, 64, 64, 64)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (file_of(format="other"), ["'other'", "version 1", "sortserve-ladder"]),
        (file_of(version=3), ["version 3", "version 2"]),
        (file_of(version=3, new_key=1), ["version 3", "version 2"]),
        (file_of(entries=[{"depth": 2, "width": 4, "method": "x"}]), ["entries[0]", "'method'", "version 2"]),
        (file_of(measured={"metric": "m", "date": "today"}), ["measured", "'date'", "version 2"]),
        (file_of(pairs=[]), ["'pairs'", "version 2"]),
        (file_of(version=2, pairs=[{"prompt": "d6", "answer": "d9", "domains": {}}]), ["'d9'", "d3-w50, d6"]),
        (file_of(version=2, entries=[{"depth": 2, "width": 4, "domains": {"a": {"loss": 1}}}]), ["entries[0]", "loss"]),
        (file_of(version=2, entries=[{"depth": 2, "width": 4, "scores": {"a": {"vaule": 1}}}]), ["scores", "vaule"]),
        (file_of(num_layers=7), ["7 layers", "6"]),
        (file_of(ffn_width=128), ["128 FFN", "64"]),
        (file_of(extra=1), ["extra"]),
        (file_of(entries=None), ["entries"]),
        (file_of(measured={"metric": "m", "sample": 3}), ["sample", "measured"]),
        (file_of(entries=[{"depth": 2, "width": 4, "widht": 4}]), ["widht", "entries[0]"]),
        (file_of(entries=[{"depth": 2.5, "width": 4}]), ["depth"]),
        (file_of(entries=[{"depth": 2, "width": "4"}]), ["width"]),
        (
            file_of(entries=[{"depth": 1, "width": 4}, {"depth": 2, "width": 4, "quality": {"value": 1.5}}]),
            ["entries[1]", "1.5", "[0, 1]"],
        ),
        (file_of(entries=[{"depth": 2, "width": 4, "quality": {"value": -0.1}}]), ["entries[0]", "-0.1", "[0, 1]"]),
        (
            file_of(entries=[{"depth": 2, "width": 4, "quality": {"value": 0.5, "low": 0.6}}]),
            ["entries[0]", "[0.6, 0.5]", "0.5"],
        ),
        (file_of(entries=[{"depth": 3, "width": [4, 4]}]), ["entries[0]", "2 layers", "depth is 3"]),
        (file_of(entries=[{"depth": 3, "width": 65}]), ["entries[0]", "width is 65", "64"]),
        (file_of(entries=[{"depth": 7, "width": 4}]), ["entries[0]", "depth is 7", "6"]),
        (file_of(entries=[{"depth": 10**12, "width": 4}]), ["entries[0]", f"depth is {10**12}", "6"]),
        (file_of(entries=[{"depth": 0, "width": 4}]), ["entries[0]", "depth is 0", "1"]),
        (file_of(entries=[{"depth": 2, "width": 4, "skip_ffn": [-1]}]), ["entries[0]", "-1"]),
        (file_of(entries=[{"depth": 2, "width": 4, "skip_attention": [-1]}]), ["entries[0]", "-1"]),
        (
            file_of(entries=[{"depth": 1, "width": 4, "id": "x"}, {"depth": 2, "width": 4, "id": "x"}]),
            ["'x'", "one id"],
        ),
        (file_of(entries=[{"depth": 1, "width": 4, "id": "x"}, {"depth": 1, "width": 4, "id": "y"}]), ["twice", "'x'"]),
        (b'{"format": "sortserve-ladder"', ["truncated"]),
        (b'{"format": "\xff"}', ["ladder.json"]),
        (b"[" * 100_000, ["ladder.json"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:70],
)
def test_malformed_files_are_told(tmp_path: Path, content: Any, told: list[str]) -> None:
    with pytest.raises(LadderError) as raised:
        load(tmp_path, content)
    assert all(part in raised.value.message for part in told), raised.value.message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(LadderError, match=r"nowhere.*No such file"):
        Ladder.load(tmp_path / "nowhere", SHAPE)


def test_the_full_model_must_be_last() -> None:
    with pytest.raises(LadderError, match="full model"):
        Ladder(SHAPE, (Entry("a", SubModel.make(2, 4)),))
    with pytest.raises(LadderError, match="full model"):
        Ladder(SHAPE, ())


# ---- floors


def test_default_floor_is_the_smallest_that_is_not_degraded() -> None:
    assert small_ladder().default_floor == 0
    ladder = small_ladder(degraded=["d1-w50", "d1", "d3"])
    assert ladder.entries[ladder.default_floor].id == "d3-w50"
    everything = [entry.id for entry in ladder.entries[:-1]]
    assert small_ladder(degraded=everything).default_floor == ladder.full


def of_qualities(qualities: list[float | None]) -> Ladder:
    entries = [
        Entry(f"e{width}", SubModel.make(6, width), None if quality is None else Quality(quality))
        for width, quality in enumerate(qualities)
    ]
    return Ladder.of(SHAPE, entries)


@given(st.lists(st.none() | st.floats(0, 1), max_size=6), st.floats(0, 1))
def test_above_a_quality_floor_everything_has_the_quality(qualities: list[float | None], share: float) -> None:
    ladder = of_qualities(qualities)
    floor = ladder.quality_floor(share)

    def enough(place: int) -> bool:
        quality = ladder.entries[place].quality
        return place == ladder.full or (quality is not None and quality.value >= share)

    assert all(enough(place) for place in range(floor, ladder.full + 1))
    assert floor == 0 or not enough(floor - 1), "a cheaper floor would have done"


def test_quality_floor_does_not_trust_a_lucky_small_entry() -> None:
    """It used to answer with the cheapest good entry, although a policy may then choose the poor one above it."""
    assert of_qualities([0.9, 0.5, 0.95]).quality_floor(0.8) == 2
    assert of_qualities([0.9, None, 0.95]).quality_floor(0.8) == 2
    assert of_qualities([0.9, 0.92, 0.95]).quality_floor(0.8) == 0
    assert of_qualities([0.9]).quality_floor(1.0) == 1


def test_quality_of_an_answer_is_the_mean_over_its_tokens() -> None:
    full = SubModel.full(SHAPE)
    entries = [Entry("a", SubModel.make(3, 32)), Entry("b", SubModel.make(6, 32), Quality(0.9)), Entry("c", full)]
    ladder = Ladder.of(SHAPE, entries)
    costs = [cost.weight_bytes for cost in ladder.costs]
    assert ladder.qualities == (costs[0] / costs[2], 0.9, 1.0), "unmeasured: the share of the weight bytes"
    assert ladder.mean_quality({"b": 3, "c": 1}) == pytest.approx(0.925)
    assert ladder.mean_quality({"c": 7}) == 1.0
    assert ladder.mean_quality({}) is None
    assert ladder.mean_quality({"c": 7, "of another ladder": 1}) is None


def test_an_unknown_id_is_told_with_what_there_is() -> None:
    with pytest.raises(NotFoundError, match=r"'d9'.*d1-w50, d1, d3-w50") as raised:
        small_ladder().place("d9", param="submodel_floor")
    assert raised.value.param == "submodel_floor"


# ---- FFN blocks, default ladder, settings


@given(ladders(), st.integers(0, SHAPE.num_layers - 1), st.integers(1, 6))
def test_ffn_boundaries(ladder: Ladder, layer: int, most: int) -> None:
    widths = {e.submodel.widths[layer] for e in ladder.entries if e.submodel.depth > layer} - {0}
    boundaries = ladder.ffn_boundaries(layer, most)
    assert list(boundaries) == sorted(set(boundaries))
    assert len(boundaries) <= most
    assert boundaries[-1] == SHAPE.ffn_width
    assert set(boundaries) <= widths
    if len(widths) <= most:
        assert set(boundaries) == widths
    assert len(ladder.ffn_boundaries(layer)) <= 4


@pytest.mark.parametrize("ffn_width", [1, 2, 3, 64, 511, 512, 4864, 14336])
def test_default_ladder(ffn_width: int) -> None:
    """Of an FFN of 1 or 2 neurons, 75 % is all of it; that used to be two entries of one id."""
    shape = ModelShape(24, 896, ffn_width, 14, 2, 64, 1000)
    ladder = Ladder.default(shape)
    assert ladder.exits == (24,)
    assert ladder.entries[-1].submodel == SubModel.full(shape)
    assert all(entry.quality is None or entry.submodel == SubModel.full(shape) for entry in ladder.entries)
    assert [entry.submodel.widths[0] for entry in ladder.entries][:-1] == {
        1: [],
        2: [],
        3: [2],
        64: [48],
        511: [383],
        512: [384],
        4864: [3584],
        14336: [10752],
    }[ffn_width]


@given(ladders())
def test_settings_ids_are_equal_where_layers_run_alike(ladder: Ladder) -> None:
    table = SettingsTable(ladder)
    for place, entry in enumerate(ladder.entries):
        assert ladder.exits[table.exits[place] - 1] == entry.submodel.depth
        told = [setting for s, i in enumerate(table.targets[place]) for setting in table.settings(s, i)]
        assert tuple(told) == entry.submodel.settings(0, entry.submodel.depth)
        alike = [
            other
            for other, theirs in enumerate(ladder.entries)
            if all(a == b for a, b in zip(told, theirs.submodel.settings(0, theirs.submodel.depth), strict=False))
        ]
        assert table.compatible(place) == alike
    for segment in range(ladder.num_segments):
        distinct = {table.settings(segment, i) for i in range(table.num_settings(segment))}
        assert len(distinct) == table.num_settings(segment)
