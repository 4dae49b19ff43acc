"""Sub-models as values: canonical, validated, and their cost against a naive count of weights."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine.submodel import Cost, ModelShape, SubModel
from tests.engine.small import SHAPE

LAYERS, WIDTH = SHAPE.num_layers, SHAPE.ffn_width


@st.composite
def submodels(draw: st.DrawFn) -> SubModel:
    depth = draw(st.integers(1, LAYERS))
    widths = draw(st.lists(st.integers(0, WIDTH), min_size=depth, max_size=LAYERS))
    return SubModel.make(depth, widths, draw(st.sets(st.integers(0, LAYERS - 1))))


def naive_weights(submodel: SubModel, shape: ModelShape) -> int:
    """Every matrix that a token's step reads, one by one."""
    count = shape.vocab_size * shape.hidden_size  # head
    for layer in range(submodel.depth):
        count += shape.num_heads * shape.head_dim * shape.hidden_size  # Q
        count += 2 * shape.num_kv_heads * shape.head_dim * shape.hidden_size  # K, V
        if layer not in submodel.skip_attention:
            count += shape.hidden_size * shape.num_heads * shape.head_dim  # O
        for _ in ("gate", "up", "down"):
            count += shape.hidden_size * submodel.widths[layer]
    return count


@given(submodels())
def test_cost_is_the_weights_read(submodel: SubModel) -> None:
    weights = naive_weights(submodel, SHAPE)
    assert submodel.cost(SHAPE) == Cost(weight_bytes=4 * weights, flops=2 * weights)
    assert submodel.parameters(SHAPE) == weights


@given(submodels(), st.integers(0, LAYERS - 1), st.integers(0, LAYERS - 1))
def test_what_is_said_above_the_exit_does_not_exist(submodel: SubModel, attention: int, ffn: int) -> None:
    above = [layer for layer in (attention, ffn) if layer >= submodel.depth]
    widths = [*submodel.widths, *range(1, LAYERS - submodel.depth + 1)]
    again = SubModel.make(submodel.depth, widths, [*submodel.skip_attention, *above], above)
    assert again == submodel
    assert hash(again) == hash(submodel)


@given(submodels())
def test_settings_of_neighbouring_ranges_join(submodel: SubModel) -> None:
    for cut in range(submodel.depth + 1):
        joined = submodel.settings(0, cut) + submodel.settings(cut, submodel.depth)
        assert joined == submodel.settings(0, submodel.depth)
    on = [attention for _, attention in submodel.settings(0, submodel.depth)]
    assert [layer for layer, is_on in enumerate(on) if not is_on] == list(submodel.skip_attention)


def test_it_is_a_value() -> None:
    one = SubModel.make(3, 16, skip_attention=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.depth = 2  # type: ignore[misc]
    assert {one, SubModel(3, (16, 16, 16), (1,))} == {one}


def test_skipping_an_ffn_is_width_zero() -> None:
    assert SubModel.make(3, 16, skip_ffn=[1]).widths == (16, 0, 16)


def test_full_reads_everything() -> None:
    full = SubModel.full(SHAPE)
    assert full == SubModel.make(LAYERS, WIDTH)
    per_layer = 16 * 8 * (2 + 2 + 1 + 1) + 3 * 16 * 64  # Q and O of 2 heads, K and V of 1; gate, up, down
    assert full.parameters(SHAPE) == 6 * per_layer + 16 * 100


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SubModel(0, ()), ["depth is 0", "at least 1"]),
        (lambda: SubModel.make(-2, 4), ["depth is -2", "at least 1"]),
        (lambda: SubModel.make(3, [4, 4]), ["2 widths", "depth 3"]),
        (lambda: SubModel(2, (4, -1)), ["-1", "negative"]),
        (lambda: SubModel(2, (4, 4), (1, 0)), ["(1, 0)", "ascending"]),
        (lambda: SubModel(2, (4, 4), (1, 1)), ["(1, 1)", "repeats"]),
        (lambda: SubModel(2, (4, 4), (2,)), ["(2,)", "[0, 2)"]),
        (lambda: SubModel.make(2, 4, skip_attention=[-1]), ["-1", "[0, 2)"]),
        (lambda: SubModel.make(2, 4, skip_ffn=[-1]), ["-1", "negative"]),
        (lambda: SubModel.make(2, 4, skip_ffn=[-9]), ["-9", "negative"]),
        (lambda: SubModel.make(7, 64).check(SHAPE), ["depth is 7", "6 layers"]),
        (lambda: SubModel.make(2, 65).check(SHAPE), ["width is 65", "64 neurons"]),
    ],
)
def test_malformed_values_are_told(make: Any, told: list[str]) -> None:
    """A negative layer in `skip_ffn` used to switch off the last one, or to be an IndexError."""
    with pytest.raises(ValueError, match=r".") as raised:
        make()
    assert all(part in str(raised.value) for part in told), raised.value


def test_names() -> None:
    assert SubModel.make(4, 64).name(SHAPE) == "d4"
    assert SubModel.make(4, 32).name(SHAPE) == "d4-w50"
    for nameless in (
        SubModel.make(4, 0),
        SubModel.make(4, 64, skip_attention=[1]),
        SubModel.make(2, [64, 32]),
        SubModel.make(4, 64, skip_ffn=[0]),
    ):
        assert nameless.name(SHAPE) is None


def test_cost_grows_with_depth_and_width() -> None:
    grid = [SubModel.make(depth, width) for depth, width in itertools.product(range(1, 7), (0, 16, 64))]
    for small, big in itertools.product(grid, grid):
        if small.depth <= big.depth and small.widths[0] <= big.widths[0] and small != big:
            assert small.cost(SHAPE) < big.cost(SHAPE)
