"""Paged attention on the GPU: one call for decode rows, prompt chunks and refills, in any mix.

    out_r = sum_t softmax_t(cap(q_r.k_t scale)) v_t over the tokens t <= position_r, the last `window` of them if given

Tiles of one row go to the split-K decode kernel (attention_decode.py), longer ones to the chunk kernel
(attention_chunk.py). Grids depend on sizes that the host knows, never on what is on the device: no synchronisation, and
a captured graph serves every mix of contexts up to `max_context`. `reference` is the float64 formula.
"""

import torch
from torch import Tensor

from sortserve.kernels.gpu.attention_chunk import attend_chunks, rows_per_tile
from sortserve.kernels.gpu.attention_decode import AttentionScratch, attend_decode
from sortserve.kernels.gpu.paged import NO_WINDOW, PagedRows, PoolShape, Scores, reference

__all__ = ["AttentionScratch", "PagedRows", "paged_attention", "reference", "rows_per_tile"]


def paged_attention(
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
    """query [rows, heads, head_dim] over the K/V in `pool` -> [rows, heads * head_dim]; padding rows become zeros.

    `scale` on q.k is 1 / sqrt(head_dim) unless given. `key_scale` and `value_scale` are those of an fp8 pool, which
    holds K / key_scale and V / value_scale. Raises ValueError for what does not fit; what the device tensors say (pages,
    positions, tiles) is the caller's word.
    """
    shape = check(query, pool, batch, page_layers, layer_in_page, num_kv_heads)
    if pool.dtype != torch.float8_e4m3fn and (key_scale is not None or value_scale is not None):
        raise ValueError(f"key_scale and value_scale are for float8_e4m3fn pools, not {pool.dtype}")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window {window} and softcap {softcap} must be positive or None")
    width = shape.num_heads * shape.head_dim
    if out is None:
        out = torch.empty(query.shape[0], width, dtype=query.dtype, device=query.device)
    elif tuple(out.shape) != (query.shape[0], width) or not out.is_contiguous() or out.dtype != query.dtype:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}, expected contiguous {(query.shape[0], width)}")
    if query.shape[0] == 0:
        return out
    scores = Scores(
        (shape.head_dim**-0.5 if scale is None else scale) * (key_scale or 1.0),
        softcap or 0.0,
        NO_WINDOW if window is None else window,
        value_scale or 1.0,
    )
    attend_decode(query, pool, batch, shape, scores, layer_in_page, out, scratch)
    if batch.max_tile_rows > 1:
        attend_chunks(query, pool, batch, shape, scores, layer_in_page, out)
    return out


def check(
    query: Tensor, pool: Tensor, batch: PagedRows, page_layers: int, layer_in_page: int, num_kv_heads: int
) -> PoolShape:
    """The sizes of a call; ValueError where they do not fit."""
    if query.dim() != 3 or query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        raise ValueError(f"query {tuple(query.shape)} with strides {query.stride()}: heads of a row must lie together")
    rows, num_heads, head_dim = query.shape
    if num_heads % num_kv_heads or head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"{num_heads} heads of {head_dim} on {num_kv_heads}: head size 16-256, a multiple of 8")
    if pool.dim() != 3 or pool.shape[2] != num_kv_heads * head_dim or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)}, expected contiguous (.., .., {num_kv_heads * head_dim})")
    if pool.shape[1] not in (16, 32, 64):
        raise ValueError(f"pages of {pool.shape[1]} tokens; the kernels read 16, 32 or 64")
    if not 0 <= layer_in_page < page_layers or pool.shape[0] % (2 * page_layers):
        raise ValueError(f"layer {layer_in_page} of {page_layers} in a page, pool of {pool.shape[0]} rows")
    if pool.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a pool of {pool.dtype} for queries of {query.dtype}")
    if (
        pool.dtype == torch.float8_e4m3fn
        and pool.device.type == "cuda"
        and torch.cuda.get_device_capability(pool.device) < (8, 9)
    ):
        raise ValueError("float8_e4m3fn K/V needs compute capability 8.9 or newer")
    if batch.max_context < 1 or batch.max_context > batch.tables.shape[1] * pool.shape[1]:
        raise ValueError(f"max_context {batch.max_context}, but tables of {batch.tables.shape[1]} pages")
    _check_rows(batch, rows, query.device)
    shape = PoolShape(num_heads, num_kv_heads, head_dim, pool.shape[1], page_layers)
    limit = rows_per_tile(num_heads, num_kv_heads, head_dim)
    if not 1 <= batch.max_tile_rows <= limit:
        raise ValueError(f"tiles of {batch.max_tile_rows} rows, the limit here is {limit}")
    return shape


def _check_rows(batch: PagedRows, rows: int, device: torch.device) -> None:
    indexes = {
        "tables": batch.tables,
        "row_sequence": batch.row_sequence,
        "row_position": batch.row_position,
        "tile_first_row": batch.tile_first_row,
        "tile_rows": batch.tile_rows,
    }
    for name, index in indexes.items():
        if index.dtype != torch.int32 or index.stride(-1) != 1 or index.device != device:
            raise ValueError(f"{name} is {index.dtype} on {index.device}, expected contiguous int32 on {device}")
    for name in ("row_sequence", "row_position"):
        if tuple(indexes[name].shape) != (rows,):
            raise ValueError(f"{name} {tuple(indexes[name].shape)}, expected ({rows},)")
    if batch.tables.dim() != 2 or batch.tile_rows.dim() != 1 or batch.tile_first_row.shape != batch.tile_rows.shape:
        raise ValueError("tables has two dimensions; tile_first_row and tile_rows one, and equal sizes")
