"""Which attention back end is chosen, and what is told of the others; the libraries themselves need a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import backends
from sortserve.kernels.gpu.attention import paged_attention
from sortserve.kernels.gpu.backends import OURS, Offer, fastest, layer_views, offers
from tests.kernels.closeness import tolerance, worst_row_error
from tests.kernels.gpu.paged_case import LAYER, PAGE_LAYERS, Case, decode

SIZES: dict[str, Any] = {"page_layers": PAGE_LAYERS, "layer_in_page": LAYER, "num_kv_heads": 2}


def test_without_libraries_ours_is_chosen_and_the_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    case = Case(decode(5))
    choice = fastest(offers(torch.device("cpu"), 32, torch.float32), case.query, case.pool.tensor, case.batch, **SIZES)
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
    def wrong(query: Tensor, pool: Tensor, batch: Any, **options: Any) -> Tensor:
        return paged_attention(query, pool, batch, **options) * 1.05

    def raising(query: Tensor, pool: Tensor, batch: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel for this\nand more")

    def quick(query: Tensor, pool: Tensor, batch: Any, **options: Any) -> Tensor:
        return paged_attention(query, pool, batch, **options)

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
    choice = fastest(offered, case.query, case.pool.tensor, case.batch, timer=timer, **SIZES)
    assert (choice.name, choice.call) == ("quick", quick)
    assert choice.milliseconds == {OURS: 2.0, "quick": 1.0}
    assert choice.reasons["wrong"] == "its result differs by 0.05 from ours"
    assert choice.reasons["raising"] == "RuntimeError: no kernel for this"
    assert choice.reasons["absent"] == "not installed"
    assert OURS in choice.reasons


def test_views_share_the_pool() -> None:
    case = Case(decode(40))
    views = layer_views(case.pool.tensor, PAGE_LAYERS, LAYER, 2)
    page, place = int(case.batch.tables[0, 2]), 7
    for which, view in enumerate(views):
        row = page * 2 * PAGE_LAYERS + which * PAGE_LAYERS + LAYER
        assert view.data_ptr() == case.pool.tensor[which * PAGE_LAYERS + LAYER].data_ptr()
        assert torch.equal(view[page, place].flatten(), case.pool.tensor[row, place])


@pytest.mark.parametrize("window", [None, 9])
def test_flash_attention_is_asked_for_the_same(window: int | None) -> None:
    """Its documented arguments, answered by a model of it: lengths, a page table, views, a window of [left, right]."""

    def with_cache(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert causal
        assert query.shape[1] == 1
        assert page_table.dtype == cache_seqlens.dtype == torch.int32
        scale = softmax_scale or query.shape[-1] ** -0.5
        out = torch.zeros_like(query)
        for row, length in enumerate(cache_seqlens.tolist()):
            if length == 0:
                continue
            first = 0 if window_size == (-1, -1) else max(0, length - 1 - window_size[0])
            keys, values = (pages[page_table[row].long()].flatten(0, 1)[first:length] for pages in (key, value))
            group = query.shape[2] // keys.shape[1]
            scores = torch.einsum("hd,chd->hc", query[row, 0], keys.repeat_interleave(group, 1)) * scale
            if softcap:
                scores = (scores / softcap).tanh() * softcap
            out[row, 0] = torch.einsum("hc,chd->hd", scores.softmax(-1), values.repeat_interleave(group, 1))
        return out

    case = Case([*decode(40, 17), (-1, 0)], window=window)
    call = backends._through(with_cache)
    expected = case.expected(softcap=2.0)
    out = call(case.query, case.pool.tensor, case.batch, window=window, softcap=2.0, **SIZES)
    assert worst_row_error(out[:2], expected[:2]) <= tolerance(torch.float32, roundings=6, terms=300)
    assert (out[2] == 0).all()
    chunk = Case([(3, 8)], tile=4)
    assert torch.equal(call(chunk.query, chunk.pool.tensor, chunk.batch, **SIZES), chunk.run())
