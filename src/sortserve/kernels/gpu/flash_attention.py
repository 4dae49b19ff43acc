"""FlashAttention 3 (Shah et al., arXiv 2407.08608) on our pages, behind the call of `paged_attention`.

The pool interleaves K and V of g layers in a page. For one layer both are views with strides, [pages, block_tokens,
kv_heads, head_dim], which `flash_attn_with_kvcache` reads in place, pages of any size, lengths from the device. Decode
rows are sequences of one query each; tiles of several rows are the sequences of a ragged batch, whose causal mask is
aligned to their ends:

    tile i:  queries [tile_first_row[i], tile_first_row[i + 1]), the last of them at position cache_seqlens[i] - 1
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sortserve.kernels.gpu.attention import AttentionLayer, AttentionScratch, PagedRows, paged_attention

MODULE = "flash_attn_interface"


def layer_views(pool: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """K and V of one layer as views [pages, block_tokens, kv_heads, head_dim] of the pool."""
    heads = layer.num_kv_heads
    pages = pool.view(-1, 2, layer.page_layers, pool.shape[1], heads, pool.shape[2] // heads)
    return pages[:, 0, layer.layer_in_page], pages[:, 1, layer.layer_in_page]


def library(device: torch.device, head_dim: int, pool_dtype: torch.dtype) -> Callable[..., Tensor]:
    """Its `flash_attn_with_kvcache`. Raises ValueError with the reason why it cannot serve here."""
    if importlib.util.find_spec(MODULE) is None:
        raise ValueError(f"{MODULE} (FlashAttention 3) is not installed")
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise ValueError("FlashAttention 3 is for Hopper GPUs")
    if pool_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{pool_dtype} K/V would need queries of that type there")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"a head size of {head_dim}")
    try:
        call: Callable[..., Tensor] = importlib.import_module(MODULE).flash_attn_with_kvcache
    except (ImportError, OSError, AttributeError) as error:  # built for another torch or CUDA
        raise ValueError(f"cannot be imported: {error}") from error
    return call


def on_our_pages(with_cache: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The call. Tiles that leave rows out are taken by our kernels: a ragged batch has no gaps."""

    def attention(
        query: Tensor,
        pool: Tensor,
        batch: PagedRows,
        layer: AttentionLayer,
        *,
        scratch: AttentionScratch | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if batch.max_tile_rows > 1 and not batch.whole:
            return paged_attention(query, pool, batch, layer, scratch=scratch, out=out)
        if layer.key_scale is not None or layer.value_scale is not None:
            raise ValueError("key_scale and value_scale are for float8_e4m3fn pools, which FlashAttention does not get")
        key, value = layer_views(pool, layer)
        window = layer.window
        queries, sequence, last_row, ragged = _sequences(query, batch)
        result = with_cache(
            queries,
            key,
            value,
            cache_seqlens=last_row + 1,  # 0 for padding rows: their result is zeros
            page_table=batch.tables.index_select(0, sequence),
            softmax_scale=layer.scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
            softcap=layer.softcap or 0.0,
            **ragged,
        )
        flat = result.view(query.shape[0], -1)
        return flat if out is None else out.copy_(flat)

    return attention


def _sequences(query: Tensor, batch: PagedRows) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """What the library calls sequences: their queries, rows of the tables, last positions, and how a ragged batch is cut."""
    if batch.max_tile_rows == 1:
        return query[:, None], batch.row_sequence, batch.row_position, {}
    first = batch.tile_first_row
    last = first + batch.tile_rows - 1
    ends = torch.full((1,), query.shape[0], dtype=torch.int32, device=query.device)
    ragged = {"cu_seqlens_q": torch.cat([first, ends]), "max_seqlen_q": batch.max_tile_rows}
    return query, batch.row_sequence.index_select(0, first), batch.row_position.index_select(0, last), ragged
