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
from sortserve.kernels.gpu.paged import AttentionLayer, PagedRows, PoolShape, reference

__all__ = ["AttentionLayer", "AttentionScratch", "PagedRows", "paged_attention", "reference", "rows_per_tile"]


def paged_attention(
    query: Tensor,
    pool: Tensor,
    batch: PagedRows,
    layer: AttentionLayer,
    *,
    scratch: AttentionScratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """query [rows, heads, head_dim] over the K/V in `pool` -> [rows, heads * head_dim]; padding rows become zeros. Raises
    ValueError for what does not fit; what the device tensors say (pages, positions, tiles) is the caller's word."""
    shape = check(query, pool, batch, layer)
    width = shape.num_heads * shape.head_dim
    if out is None:
        out = torch.empty(query.shape[0], width, dtype=query.dtype, device=query.device)
    elif tuple(out.shape) != (query.shape[0], width) or not out.is_contiguous() or out.dtype != query.dtype:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}, expected contiguous {(query.shape[0], width)}")
    if query.shape[0] == 0:
        return out
    scores = layer.scores(shape.head_dim)
    attend_decode(query, pool, batch, shape, scores, layer.layer_in_page, out, scratch)
    if batch.max_tile_rows > 1:
        attend_chunks(query, pool, batch, shape, scores, layer.layer_in_page, out)
    return out


def check(query: Tensor, pool: Tensor, batch: PagedRows, layer: AttentionLayer) -> PoolShape:
    """The sizes of a call; ValueError where they do not fit."""
    num_kv_heads, page_layers = layer.num_kv_heads, layer.page_layers
    _check_scores(layer, pool)
    if query.dim() != 3 or query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        raise ValueError(f"query {tuple(query.shape)} with strides {query.stride()}: heads of a row must lie together")
    rows, num_heads, head_dim = query.shape
    if num_heads % num_kv_heads or head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"{num_heads} heads of {head_dim} on {num_kv_heads}: head size 16-256, a multiple of 8")
    if pool.dim() != 3 or pool.shape[2] != num_kv_heads * head_dim or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)}, expected contiguous (.., .., {num_kv_heads * head_dim})")
    if pool.shape[1] not in (16, 32, 64):
        raise ValueError(f"pages of {pool.shape[1]} tokens; the kernels read 16, 32 or 64")
    if not 0 <= layer.layer_in_page < page_layers or pool.shape[0] % (2 * page_layers):
        raise ValueError(f"layer {layer.layer_in_page} of {page_layers} in a page, pool of {pool.shape[0]} rows")
    if pool.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a pool of {pool.dtype} for queries of {query.dtype}")
    if batch.max_context < 1 or batch.max_context > batch.tables.shape[1] * pool.shape[1]:
        raise ValueError(f"max_context {batch.max_context}, but tables of {batch.tables.shape[1]} pages")
    _check_rows(batch, rows, query.device)
    shape = PoolShape(num_heads, num_kv_heads, head_dim, pool.shape[1], page_layers)
    limit = rows_per_tile(num_heads, num_kv_heads, head_dim)
    if not 1 <= batch.max_tile_rows <= limit:
        raise ValueError(f"tiles of {batch.max_tile_rows} rows, the limit here is {limit}")
    return shape


def _check_scores(layer: AttentionLayer, pool: Tensor) -> None:
    is_fp8 = pool.dtype == torch.float8_e4m3fn
    if not is_fp8 and (layer.key_scale is not None or layer.value_scale is not None):
        raise ValueError(f"key_scale and value_scale are for float8_e4m3fn pools, not {pool.dtype}")
    if is_fp8 and pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device) < (8, 9):
        raise ValueError("float8_e4m3fn K/V needs compute capability 8.9 or newer")
    if (layer.window is not None and layer.window < 1) or (layer.softcap is not None and layer.softcap <= 0):
        raise ValueError(f"window {layer.window} and softcap {layer.softcap} must be positive or None")


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
