"""FlashAttention 3's `flash_attn_with_kvcache` by its documented arguments, in PyTorch: what it reads, and how it masks."""

import itertools

import torch
from torch import Tensor


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
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> Tensor:
    """Queries [sequences, 1, heads, head_dim], or [rows, heads, head_dim] cut by `cu_seqlens_q`; the causal mask is aligned
    to the end of each, a window is [left, right] and includes both, a sequence of no tokens gets zeros."""
    assert causal
    assert page_table.dtype == cache_seqlens.dtype == torch.int32
    flat = query.view(-1, *query.shape[-2:])
    cuts = list(range(len(flat) + 1))
    if cu_seqlens_q is None:
        assert query.dim() == 4
        assert query.shape[1] == 1
    else:
        assert cu_seqlens_q.dtype == torch.int32
        cuts = cu_seqlens_q.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(cuts)]
        assert min(lengths) > 0
        assert max(lengths) <= (max_seqlen_q or 0)
    assert len(cuts) == len(page_table) + 1 == len(cache_seqlens) + 1
    out = torch.zeros_like(flat)
    for sequence, length in enumerate(cache_seqlens.tolist()):
        begin, end = cuts[sequence : sequence + 2]
        for row in range(begin, end) if length else ():
            stop = length - (end - 1 - row)
            first = 0 if window_size == (-1, -1) else max(0, stop - 1 - window_size[0])
            keys, values = (pages[page_table[sequence].long()].flatten(0, 1)[first:stop] for pages in (key, value))
            group = flat.shape[1] // keys.shape[1]
            scores = torch.einsum("hd,chd->hc", flat[row], keys.repeat_interleave(group, 1))
            scores *= softmax_scale or flat.shape[-1] ** -0.5
            if softcap:
                scores = (scores / softcap).tanh() * softcap
            out[row] = torch.einsum("hc,chd->hd", scores.softmax(-1), values.repeat_interleave(group, 1))
    return out.view(query.shape)
