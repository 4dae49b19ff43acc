"""Which attention back end is chosen, and what is told of the others; the libraries themselves need a GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import flash_attention
from sortserve.kernels.gpu.attention import AttentionLayer, paged_attention
from sortserve.kernels.gpu.backends import OURS, Offer, by_rows, fastest, offers
from sortserve.kernels.gpu.flash_attention import layer_views
from tests.kernels.closeness import tolerance, worst_row_error
from tests.kernels.gpu.flash_attention_model import with_cache
from tests.kernels.gpu.paged_case import LAYER, PAGE_LAYERS, Case, decode

LAYERS = AttentionLayer(PAGE_LAYERS, LAYER, 2)


def test_without_libraries_ours_is_chosen_and_the_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    case = Case(decode(5))
    choice = fastest(offers(torch.device("cpu"), 32, torch.float32), case.query, case.pool.tensor, case.batch, LAYERS)
    assert (choice.name, choice.call) == (OURS, paged_attention)
    assert choice.reasons == {
        "flash_attn_interface": "flash_attn_interface (FlashAttention 3) is not installed",
        "flash_attn": "flash_attn is not installed",
        "flashinfer": "flashinfer is not installed",
    }


def test_what_is_installed_but_does_not_fit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    reasons = {offer.name: offer.reason for offer in offers(torch.device("cpu"), 32, torch.float32)}
    assert "256 tokens" in reasons["flash_attn"]
    assert "on the host" in reasons["flashinfer"]
    assert "Hopper" in reasons["flash_attn_interface"]


def test_the_fastest_that_agrees_is_chosen() -> None:
    def wrong(query: Tensor, pool: Tensor, batch: Any, layer: Any, **options: Any) -> Tensor:
        return paged_attention(query, pool, batch, layer, **options) * 1.05

    def raising(query: Tensor, pool: Tensor, batch: Any, layer: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel for this\nand more")

    def quick(query: Tensor, pool: Tensor, batch: Any, layer: Any, **options: Any) -> Tensor:
        return paged_attention(query, pool, batch, layer, **options)

    times = iter([2.0, 1.0])

    def timer(call: Callable[[], Tensor]) -> float:
        call()
        return next(times)

    case = Case(decode(20, 3))
    offered = [
        Offer(OURS, paged_attention),
        Offer("wrong", wrong),
        Offer("raising", raising),
        Offer("quick", quick),
        Offer("absent", None, "not installed"),
    ]
    choice = fastest(offered, case.query, case.pool.tensor, case.batch, LAYERS, timer=timer)
    assert (choice.name, choice.call) == ("quick", quick)
    assert choice.milliseconds == {OURS: 2.0, "quick": 1.0}
    assert choice.reasons["wrong"] == "its result differs by 0.05 from ours"
    assert choice.reasons["raising"] == "RuntimeError: no kernel for this"
    assert choice.reasons["absent"] == "not installed"
    assert OURS in choice.reasons


def test_views_share_the_pool() -> None:
    case = Case(decode(40))
    views = layer_views(case.pool.tensor, LAYERS)
    page, place = int(case.batch.tables[0, 2]), 7
    for which, view in enumerate(views):
        row = page * 2 * PAGE_LAYERS + which * PAGE_LAYERS + LAYER
        assert view.data_ptr() == case.pool.tensor[which * PAGE_LAYERS + LAYER].data_ptr()
        assert torch.equal(view[page, place].flatten(), case.pool.tensor[row, place])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("tile", [pytest.param(1, id="decode"), pytest.param(4, id="chunk")])
def test_flash_attention_is_asked_for_the_same(window: int | None, tile: int) -> None:
    """Its documented arguments, answered by a model of it: lengths, a page table, views, a window of [left, right], and how
    rows are cut where they are several."""
    runs = [*decode(40, 17), (-1, 0)] if tile == 1 else [*decode(40), (3, 14), *decode(5)]
    case = Case(runs, window=window, tile=tile)
    if tile > 1:  # the case's last tile is unused
        first, counts = case.batch.tile_first_row[:-1].clone(), case.batch.tile_rows[:-1].clone()
        case.batch = dataclasses.replace(case.batch, tile_first_row=first, tile_rows=counts, whole=True)
    call = flash_attention.on_our_pages(with_cache)
    expected, allowed = case.expected(softcap=2.0), tolerance(torch.float32, roundings=6, terms=300)
    out = call(case.query, case.pool.tensor, case.batch, dataclasses.replace(LAYERS, window=window, softcap=2.0))
    padding = expected.abs().sum(1) == 0
    assert worst_row_error(out[~padding], expected[~padding]) <= allowed
    assert (out[padding] == 0).all()
    longer = dataclasses.replace(case.batch, row_position=case.batch.row_position + (case.batch.row_position > 15))
    case.pool.tensor.nan_to_num_(0.5)
    out = call(case.query, case.pool.tensor, longer, dataclasses.replace(LAYERS, window=window, softcap=2.0))
    assert worst_row_error(out[~padding], expected[~padding]) > 4 * allowed


def test_tiles_with_gaps_are_ours() -> None:
    chunk = Case([(3, 8), (-1, 0)], tile=4)
    call = flash_attention.on_our_pages(with_cache)
    assert torch.equal(call(chunk.query, chunk.pool.tensor, chunk.batch, LAYERS), chunk.run())


def test_single_rows_and_chunks_may_go_different_ways() -> None:
    def none(query: Tensor, pool: Tensor, batch: Any, layer: Any, **options: Any) -> Tensor:
        raise RuntimeError("not this one")

    single, chunk = Case(decode(5)), Case([(3, 8)], tile=4)
    call = by_rows(paged_attention, none)
    assert torch.equal(call(single.query, single.pool.tensor, single.batch, LAYERS), single.run())
    with pytest.raises(RuntimeError, match="not this one"):
        call(chunk.query, chunk.pool.tensor, chunk.batch, LAYERS)
    assert by_rows(paged_attention, paged_attention) is paged_attention
