"""The plan of a step in vLLM, without vLLM: segments, row order, and each row's FFN width."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.engine.vllm.model.rows import RowLayouts, Shard
from sortserve.engine.vllm.plan import deepest_first, plan_step, swaps

CPU = torch.device("cpu")
SHAPE = ModelShape(num_layers=8, hidden_size=4, ffn_width=32, num_heads=1, num_kv_heads=1, head_dim=4, vocab_size=8)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    """Places and tokens of requests, deepest first; exits by place; bounds."""
    bounds = [0, *sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=5)))]
    exits = draw(st.lists(st.integers(1, len(bounds) - 1), min_size=1, max_size=6))
    places = draw(st.lists(st.integers(0, len(exits) - 1), min_size=1, max_size=12))
    places.sort(key=lambda place: -exits[place])
    tokens = draw(st.lists(st.integers(1, 50), min_size=len(places), max_size=len(places)))
    return places, tokens, exits, bounds


@given(batches())
def test_every_request_runs_its_layers_and_no_other(batch: tuple[list[int], list[int], list[int], list[int]]) -> None:
    places, tokens, exits, bounds = batch
    plan = plan_step(places, tokens, exits, bounds)
    for request, place in enumerate(places):
        depth = bounds[exits[place]]
        run = [
            layer
            for segment in plan.segments
            for layer in range(segment.start, segment.end)
            if request < segment.num_requests
        ]
        assert run == list(range(depth))
    for segment in plan.segments:
        assert segment.num_tokens == sum(tokens[: segment.num_requests]) > 0
        assert all(plan.of_layer(layer) == segment for layer in range(segment.start, segment.end))
    assert plan.of_layer(bounds[-1]) is None
    assert plan.num_tokens == sum(tokens)
    assert all(
        one.end == other.start and one.num_requests >= other.num_requests for one, other in pairwise(plan.segments)
    )


def test_a_batch_out_of_order_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="deepest first"):
        plan_step([0, 1], [1, 1], [1, 2], [0, 2, 4])


@given(st.lists(st.integers(1, 5), max_size=20))
def test_order_is_deepest_first_and_keeps_equals(exits: list[int]) -> None:
    order = deepest_first(exits)
    assert sorted(order) == list(range(len(exits)))
    assert all((exits[a], -a) > (exits[b], -b) for a, b in pairwise(order))


@given(st.permutations(list(range(15))))
def test_swaps_bring_the_order_about(order: list[int]) -> None:
    rows = list(range(len(order)))
    done = swaps(order)
    for first, second in done:
        rows[first], rows[second] = rows[second], rows[first]
    assert rows == order
    assert len(done) < len(order)


@given(st.integers(0, 32), st.sampled_from([1, 2, 4]))
def test_a_width_is_a_prefix_on_each_rank_and_all_of_them_have_it(width: int, ranks: int) -> None:
    found: list[int] = []
    for rank in range(ranks):
        own = list(range(32))[rank::ranks]
        found += own[: Shard(32, (), rank, ranks).own(width)]
    assert sorted(found) == list(range(width))


def test_rows_of_a_layer_follow_the_submodels() -> None:
    entries = [
        Entry("half", SubModel.make(4, 16)),
        Entry("skips", SubModel.make(8, 32, skip_attention=[1], skip_ffn=[2])),
    ]
    ladder = Ladder.of(SHAPE, entries)
    half, skips, full = ladder.place("half"), ladder.place("skips"), ladder.full
    exits = [ladder.exits.index(entry.submodel.depth) + 1 for entry in ladder.entries]
    layouts = RowLayouts(ladder, [Shard(32, (16, 32))] * 8, torch.float32, CPU)
    plan = plan_step([skips, full, half], [2, 1, 3], exits, ladder.bounds)
    rows = layouts.of(plan)
    assert layouts.of(plan_step([skips, full, half], [2, 1, 3], exits, ladder.bounds)) is rows, "kept"
    assert len(rows.layers) == 8
    attention = [None if layer.attention is None else layer.attention.flatten().tolist() for layer in rows.layers]
    assert attention == [None, [0, 0, 1, 1, 1, 1], *[None] * 6]
    first = rows.layers[0].ffn
    assert first is not None
    assert first.widths.tolist() == [32] * 3 + [16] * 3
    assert [block.first for block in first.blocks] == [6, 3], "the half-wide rows, the last three, run one block"
    skipping = rows.layers[2].ffn
    assert skipping is not None
    assert skipping.blocks[0].index is not None
    assert skipping.blocks[0].index.tolist() == [2, 3, 4, 5]
    assert rows.layers[7].ffn is None, "all there run the whole FFN"


def test_rows_of_packed_weights_on_one_of_two_ranks() -> None:
    """Told their widths, the rank's own, also where all have the full width."""
    ladder = Ladder.of(SHAPE, [Entry("half", SubModel.make(8, 15))])
    layouts = RowLayouts(ladder, [Shard(32, (), 1, 2, is_packed=True)] * 8, torch.float32, CPU)
    exits = [ladder.exits.index(entry.submodel.depth) + 1 for entry in ladder.entries]
    half, full = ladder.place("half"), ladder.full
    for places, widths in (([full, full], [16, 16, 16]), ([half, full], [7, 7, 16])):
        told = layouts.of(plan_step(places, [2, 1], exits, ladder.bounds)).layers[3].ffn
        assert told is not None
        assert told.widths.tolist() == widths
