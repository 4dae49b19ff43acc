"""Attention by other libraries behind the call of `paged_attention`, chosen once at start by measurement.

FlashAttention 3  reads our pages in place, lengths from the device (flash_attention.py): offered.
FlashAttention 2  wants pages of a multiple of 256 tokens: never offered.
FlashInfer        reads them too, but its `plan` reads all lengths on the host before every step and cannot be
                  captured: not offered for serving, compared in the benchmarks.

None of them is needed: ours is always among the offers, and what raises or disagrees is out.
"""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sortserve.kernels.gpu import flash_attention
from sortserve.kernels.gpu.attention import AttentionLayer, AttentionScratch, PagedRows, paged_attention

OURS = "triton"
AGREEMENT = 0.02
"""Relative difference (of the norms) to our result above which a library is refused; bfloat16 results differ by 0.5 %."""


class AttentionCall(Protocol):
    """The call of `paged_attention`."""

    def __call__(
        self,
        query: Tensor,
        pool: Tensor,
        batch: PagedRows,
        layer: AttentionLayer,
        *,
        scratch: AttentionScratch | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """A back end, or why it is none here."""

    name: str
    call: AttentionCall | None
    reason: str = ""  # why `call` is None


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and what is told about it in the log."""

    name: str
    call: AttentionCall
    milliseconds: dict[str, float]  # of those that were measured
    reasons: dict[str, str]  # why the others are not it


def by_rows(decode: AttentionCall, chunks: AttentionCall) -> AttentionCall:
    """One call for both: `decode` where every row is a tile of its own, else `chunks`."""

    def attention(query: Tensor, pool: Tensor, batch: PagedRows, layer: AttentionLayer, **where: Any) -> Tensor:
        return (decode if batch.max_tile_rows == 1 else chunks)(query, pool, batch, layer, **where)

    return decode if decode is chunks else attention


def offers(device: torch.device, head_dim: int, pool_dtype: torch.dtype) -> tuple[Offer, ...]:
    """Ours first, then the libraries, each with the reason if it does not apply."""
    return (
        Offer(OURS, paged_attention),
        _flash_attention(device, head_dim, pool_dtype),
        _refused("flash_attn", "FlashAttention 2 needs pages of a multiple of 256 tokens, ours have 16 to 64"),
        _refused(
            "flashinfer", "its plan() reads all lengths on the host before every step, outside of a captured graph"
        ),
    )


def fastest(
    offered: Sequence[Offer],
    query: Tensor,
    pool: Tensor,
    batch: PagedRows,
    layer: AttentionLayer,
    *,
    timer: Callable[[Callable[[], Tensor]], float] | None = None,
) -> Choice:
    """The fastest of the offers for a call like this one, measured as captured graphs.

    One that raises, cannot be captured, or differs from our result by more than `AGREEMENT` is out, with the reason.
    """
    timer = timer or _graph_milliseconds
    calls = {offer.name: offer.call for offer in offered if offer.call is not None}
    reasons = {offer.name: offer.reason for offer in offered if offer.call is None}
    if len(calls) == 1:
        return Choice(OURS, calls[OURS], {}, reasons)
    expected = calls[OURS](query, pool, batch, layer).double()
    measured = dict[str, float]()
    for name, call in calls.items():
        try:
            difference = float((call(query, pool, batch, layer).double() - expected).norm() / expected.norm())
            if not difference <= AGREEMENT:
                reasons[name] = f"its result differs by {difference:.3g} from ours"
                continue
            measured[name] = timer(partial(call, query, pool, batch, layer))
        except (RuntimeError, ValueError, TypeError) as error:  # a library's own refusal, whatever it is
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    best = min(measured, key=lambda name: measured[name])
    for name, milliseconds in measured.items():
        if name != best:
            reasons[name] = f"{milliseconds:.4f} ms, {best} {measured[best]:.4f}"
    return Choice(best, calls[best], measured, reasons)


def _graph_milliseconds(call: Callable[[], Tensor]) -> float:
    """Median of 20 replays of a captured graph of the call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = list[float]()
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def _refused(module: str, reason: str) -> Offer:
    installed = importlib.util.find_spec(module) is not None
    return Offer(module, None, reason if installed else f"{module} is not installed")


def _flash_attention(device: torch.device, head_dim: int, pool_dtype: torch.dtype) -> Offer:
    try:
        call = flash_attention.on_our_pages(flash_attention.library(device, head_dim, pool_dtype))
    except ValueError as error:
        return Offer(flash_attention.MODULE, None, str(error))
    return Offer(flash_attention.MODULE, call)
