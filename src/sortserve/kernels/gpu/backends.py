"""Attention by other libraries behind the call of `paged_attention`, chosen once at start by measurement.

The pool interleaves K and V of g layers in a page. For one layer both are views with strides, [pages, block_tokens,
kv_heads, head_dim], so what takes a page stride of its own needs no copy:

FlashAttention 3  `flash_attn_with_kvcache` reads such views, pages of any size, lengths from the device: offered for
                  decode rows; chunks stay with our kernels.
FlashAttention 2  wants pages of a multiple of 256 tokens: never offered.
FlashInfer        reads such views too, but its `plan` reads all lengths on the host before every step and cannot be
                  captured: not offered for serving, compared in the benchmarks.
"""

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sortserve.kernels.gpu.attention import AttentionScratch, PagedRows, paged_attention

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
        *,
        page_layers: int,
        layer_in_page: int,
        num_kv_heads: int,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        key_scale: float | None = None,
        value_scale: float | None = None,
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


def layer_views(pool: Tensor, page_layers: int, layer_in_page: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """K and V of one layer as views [pages, block_tokens, kv_heads, head_dim] of the pool."""
    pages = pool.view(-1, 2, page_layers, pool.shape[1], num_kv_heads, pool.shape[2] // num_kv_heads)
    return pages[:, 0, layer_in_page], pages[:, 1, layer_in_page]


def offers(device: torch.device, head_dim: int, pool_dtype: torch.dtype) -> tuple[Offer, ...]:
    """Ours first, then the libraries, each with the reason if it does not apply."""
    return (
        Offer(OURS, paged_attention),
        _flash_attention_3(device, head_dim, pool_dtype),
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
    *,
    timer: Callable[[Callable[[], Tensor]], float] | None = None,
    **options: Any,
) -> Choice:
    """The fastest of the offers for a call like this one (`options` as for `paged_attention`), measured as captured graphs.

    One that raises, cannot be captured, or differs from our result by more than `AGREEMENT` is out, with the reason.
    """
    timer = timer or _graph_milliseconds
    calls = {offer.name: offer.call for offer in offered if offer.call is not None}
    reasons = {offer.name: offer.reason for offer in offered if offer.call is None}
    if len(calls) == 1:
        return Choice(OURS, calls[OURS], {}, reasons)
    expected = calls[OURS](query, pool, batch, **options).double()
    measured = dict[str, float]()
    for name, call in calls.items():
        try:
            difference = float((call(query, pool, batch, **options).double() - expected).norm() / expected.norm())
            if not difference <= AGREEMENT:
                reasons[name] = f"its result differs by {difference:.3g} from ours"
                continue
            measured[name] = timer(_bound(call, query, pool, batch, options))
        except (RuntimeError, ValueError, TypeError) as error:  # a library's own refusal, whatever it is
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    best = min(measured, key=lambda name: measured[name])
    for name, milliseconds in measured.items():
        if name != best:
            reasons[name] = f"{milliseconds:.4f} ms, {best} {measured[best]:.4f}"
    return Choice(best, calls[best], measured, reasons)


def _bound(
    call: AttentionCall, query: Tensor, pool: Tensor, batch: PagedRows, options: dict[str, Any]
) -> Callable[[], Tensor]:
    return lambda: call(query, pool, batch, **options)


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


def _flash_attention_3(device: torch.device, head_dim: int, pool_dtype: torch.dtype) -> Offer:
    name = "flash_attn_interface"  # the module of FlashAttention 3
    if importlib.util.find_spec(name) is None:
        return Offer(name, None, f"{name} (FlashAttention 3) is not installed")
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return Offer(name, None, "FlashAttention 3 is for Hopper GPUs")
    if pool_dtype not in (torch.bfloat16, torch.float16):
        return Offer(name, None, f"{pool_dtype} K/V would need queries of that type there")
    if head_dim % 8 or head_dim > 256:
        return Offer(name, None, f"a head size of {head_dim}")
    try:
        library = importlib.import_module(name)
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return Offer(name, None, f"cannot be imported: {error}")
    return Offer(name, _through(library.flash_attn_with_kvcache))


def _through(with_cache: Callable[..., Tensor]) -> AttentionCall:
    """FlashAttention 3's call as ours; batches with chunks go to our kernels."""

    def attention(
        query: Tensor,
        pool: Tensor,
        batch: PagedRows,
        *,
        page_layers: int,
        layer_in_page: int,
        num_kv_heads: int,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        key_scale: float | None = None,
        value_scale: float | None = None,
        scratch: AttentionScratch | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if batch.max_tile_rows > 1 or key_scale is not None or value_scale is not None:
            return paged_attention(
                query,
                pool,
                batch,
                page_layers=page_layers,
                layer_in_page=layer_in_page,
                num_kv_heads=num_kv_heads,
                window=window,
                softcap=softcap,
                scale=scale,
                key_scale=key_scale,
                value_scale=value_scale,
                scratch=scratch,
                out=out,
            )
        key, value = layer_views(pool, page_layers, layer_in_page, num_kv_heads)
        result = with_cache(
            query[:, None],  # one row of each sequence
            key,
            value,
            cache_seqlens=batch.row_position + 1,  # 0 for a padding row: its result is zeros
            page_table=batch.tables.index_select(0, batch.row_sequence),
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
            softcap=softcap or 0.0,
        )
        flat = result.view(query.shape[0], -1)
        return flat if out is None else out.copy_(flat)

    return attention
