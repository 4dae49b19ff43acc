"""FlashAttention 3 and FlashInfer on our pool, for the attention benchmark: calls, or None where they are not to be had."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sortserve.kernels.gpu.attention import AttentionLayer, PagedRows
from sortserve.kernels.gpu.backends import offers
from sortserve.kernels.gpu.flash_attention import layer_views

WORKSPACE_BYTES = 128 << 20


def flash_attention(
    query: Tensor, pool: Tensor, batch: PagedRows, layer: AttentionLayer
) -> Callable[[], Tensor] | None:
    """As the serving back end calls it."""
    for offer in offers(query.device, query.shape[2], pool.dtype):
        if offer.name == "flash_attn_interface" and offer.call is not None:
            call = offer.call
            return lambda: call(query, pool, batch, layer)
    return None


def flashinfer_decode(
    query: Tensor, pool: Tensor, batch: PagedRows, layer: AttentionLayer
) -> Callable[[], Tensor] | None:
    """Planned once, outside of what is measured; row i must be that of sequence i."""
    if query.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return None
    flashinfer = importlib.import_module("flashinfer")
    rows, heads, head_dim = query.shape
    size = pool.shape[1]
    lengths = (batch.row_position + 1).cpu()
    counts = -(-lengths // size)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    indices = torch.cat([batch.tables[row, : int(count)] for row, count in enumerate(counts)])
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=heads // layer.num_kv_heads >= 4,  # its documentation's advice for grouped heads
        paged_kv_indptr_buffer=torch.empty(rows + 1, dtype=torch.int32, device=query.device),
        paged_kv_indices_buffer=torch.empty(len(indices), dtype=torch.int32, device=query.device),
        paged_kv_last_page_len_buffer=torch.empty(rows, dtype=torch.int32, device=query.device),
    )
    last = ((lengths - 1) % size + 1).int()
    wrapper.plan(
        indptr,
        indices,
        last,
        heads,
        layer.num_kv_heads,
        head_dim,
        size,
        q_data_type=query.dtype,
        kv_data_type=pool.dtype,
    )
    views = layer_views(pool, layer)
    out = torch.empty_like(query)

    def run() -> Tensor:
        wrapper.run(query, views, out=out)
        return out

    return run
