"""Paged attention: bytes are K and V read once (and Q, the result); compared with SDPA, FlashAttention and FlashInfer.

SDPA and FlashAttention 2 read K and V that lie together (the latter's pages are of 256 tokens): they are spared the
pages, so to be as fast is the harder thing. FlashInfer and FlashAttention 3, where installed, read our pages in place.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.attention_libraries import flash_attention, flashinfer_decode
from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.attention import AttentionLayer, AttentionScratch, PagedRows, paged_attention, rows_per_tile

PAGE_LAYERS, LAYER, SIZE = 4, 1, 16
HEADS = ((32, 8, 128), (14, 2, 64))  # an 8B model, Qwen2.5-0.5B


def run(device: torch.device) -> list[Result]:
    """Decode over batches and contexts, prompts, refills over a cached prefix, and a mix; then an fp8 pool."""
    if small(device):
        return [
            decode(device, 4, 2, 32, [40, 3]),
            decode(device, 4, 2, 32, [40, 3], fp8=True),
            decode(device, 4, 2, 32, [40, 3], window=16),
            chunk(device, 4, 2, 32, start=16, rows=16),
            chunk(device, 4, 2, 32, start=16, rows=16, fp8=True),
            mixed(device, 4, 2, 32, contexts=[20], start=0, rows=8),
        ]
    results = [
        decode(device, *heads, [context] * batch)
        for heads in HEADS
        for batch, context in ((1, 1024), (1, 8192), (8, 2048), (32, 2048), (64, 1024), (64, 4096))
    ]
    results += [decode(device, *HEADS[0], [16384] + [512] * 31), decode(device, *HEADS[0], [2048] * 32, fp8=True)]
    results.append(decode(device, *HEADS[0], [8192] * 32, window=1024))
    results += [
        chunk(device, *heads, start=start, rows=rows)
        for heads in HEADS
        for start, rows in ((0, 512), (0, 2048), (2048, 512))
    ]
    results.append(chunk(device, *HEADS[0], start=2048, rows=512, fp8=True))
    return [*results, mixed(device, *HEADS[0], contexts=[1024] * 32, start=1024, rows=512)]


class Setting:
    """Sequences of random K and V in shuffled pages; `plain` is one sequence's K and V side by side."""

    def __init__(self, device: torch.device, kv_heads: int, head_dim: int, contexts: list[int], fp8: bool) -> None:
        self.device, self.contexts = device, contexts
        self.shape = (kv_heads, head_dim)
        blocks = [-(-context // SIZE) for context in contexts]
        shuffled = torch.randperm(sum(blocks), device=device, dtype=torch.int32)
        shape = (sum(blocks) * 2 * PAGE_LAYERS, SIZE, kv_heads * head_dim)
        self.pool = torch.randn(shape, device=device, dtype=model_dtype(device))
        if fp8:
            self.pool = self.pool.to(torch.float8_e4m3fn)
        self.tables = torch.zeros(len(contexts), max(blocks), device=device, dtype=torch.int32)
        taken = 0
        for sequence, count in enumerate(blocks):
            self.tables[sequence, :count] = shuffled[taken : taken + count]
            taken += count

    def plain(self, sequence: int) -> tuple[Tensor, Tensor]:
        """K and V [context, kv_heads, head_dim] of one sequence."""
        rows = self.tables[sequence].long() * (2 * PAGE_LAYERS) + LAYER
        key, value = (
            self.pool[rows + which * PAGE_LAYERS].view(-1, *self.shape)[: self.contexts[sequence]] for which in (0, 1)
        )
        return key, value

    def call(self, query: Tensor, batch: PagedRows, window: int | None = None) -> Callable[[], Tensor]:
        """Our kernels, with buffers of their own as in a captured graph."""
        rows, heads, head_dim = query.shape
        places = max(rows, batch.tile_rows.shape[0])
        scratch = AttentionScratch.allocate(self.device, places, heads, self.shape[0], head_dim, batch.max_context)
        out = torch.empty(rows, heads * head_dim, device=self.device, dtype=query.dtype)
        layer = AttentionLayer(PAGE_LAYERS, LAYER, self.shape[0], window)
        return lambda: paged_attention(query, self.pool, batch, layer, scratch=scratch, out=out)


def decode(
    device: torch.device,
    heads: int,
    kv_heads: int,
    head_dim: int,
    contexts: list[int],
    fp8: bool = False,
    window: int | None = None,
) -> Result:
    """One row of each sequence; with a window it need not read what lies before."""
    setting = Setting(device, kv_heads, head_dim, contexts, fp8)
    rows = len(contexts)
    query = torch.randn(rows, heads, head_dim, device=device, dtype=model_dtype(device))
    index = torch.arange(rows, device=device, dtype=torch.int32)
    positions = torch.tensor(contexts, device=device, dtype=torch.int32) - 1
    batch = PagedRows(setting.tables, index, positions, index, torch.ones_like(index), max(contexts))
    compared: dict[str, Callable[[], object]] = {}
    if not fp8 and window is None:
        if len(set(contexts)) == 1:
            keys, values = zip(*(setting.plain(sequence) for sequence in range(rows)), strict=True)
            key, value = torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)
            key, value = key.contiguous(), value.contiguous()
            # the heads of one K/V head as the rows of a call: the fastest way to ask SDPA
            grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
            compared["SDPA, K/V side by side"] = lambda: F.scaled_dot_product_attention(grouped, key, value)
        for name, make in (("FlashAttention", flash_attention), ("FlashInfer", flashinfer_decode)):
            call = make(query, setting.pool, batch, AttentionLayer(PAGE_LAYERS, LAYER, kv_heads))
            if call is not None:
                compared[name] = call
    tokens = sum(min(context, window or context) for context in contexts)
    told = f"{rows} x {contexts[0]}" if len(set(contexts)) == 1 else f"{contexts[0]} + {rows - 1} x {contexts[-1]}"
    return result(
        "decode, fp8 K/V" if fp8 else f"decode, window {window}" if window else "decode",
        f"{told} tokens, {heads} on {kv_heads} x {head_dim}",
        setting.call(query, batch, window),
        device,
        num_bytes=2 * tokens * kv_heads * head_dim * setting.pool.element_size() + 2 * query.nbytes,
        flops=4 * tokens * heads * head_dim,
        compared=compared,
    )


def chunk(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, start: int, rows: int, fp8: bool = False
) -> Result:
    """`rows` rows of one sequence over a cached prefix of `start` tokens."""
    setting = Setting(device, kv_heads, head_dim, [start + rows], fp8)
    query = torch.randn(rows, heads, head_dim, device=device, dtype=model_dtype(device))
    batch = _tiles(setting, [(start, rows)], rows_per_tile(heads, kv_heads, head_dim))
    key, value = (both.transpose(0, 1)[None].contiguous() for both in setting.plain(0))
    wide = query.transpose(0, 1)[None]
    seen = torch.arange(start + rows, device=device)[None, :] <= start + torch.arange(rows, device=device)[:, None]

    def sdpa() -> Tensor:
        if start == 0:
            return F.scaled_dot_product_attention(wide, key, value, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(wide, key, value, attn_mask=seen, enable_gqa=True)

    pairs = rows * start + rows * (rows + 1) // 2
    name = "refill over a prefix" if start else "prompt"
    return result(
        f"{name}, fp8 K/V" if fp8 else name,
        f"{rows} rows over {start}, {heads} on {kv_heads} x {head_dim}",
        setting.call(query, batch),
        device,
        num_bytes=2 * (start + rows) * kv_heads * head_dim * setting.pool.element_size() + 2 * query.nbytes,
        flops=4 * pairs * heads * head_dim,
        compared={} if fp8 else {"SDPA, K/V side by side": sdpa},
    )


def mixed(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, contexts: list[int], start: int, rows: int
) -> Result:
    """Decode rows and a chunk in one call; compared with the two calls alone."""
    setting = Setting(device, kv_heads, head_dim, [*contexts, start + rows], False)
    runs = [*((context - 1, 1) for context in contexts), (start, rows)]
    query = torch.randn(len(contexts) + rows, heads, head_dim, device=device, dtype=model_dtype(device))
    batch = _tiles(setting, runs, rows_per_tile(heads, kv_heads, head_dim))
    tokens = sum(contexts) + start + rows
    pairs = sum(contexts) + rows * start + rows * (rows + 1) // 2
    return result(
        "decode and a chunk",
        f"{len(contexts)} x {contexts[0]} tokens, {rows} rows over {start}, {heads} on {kv_heads} x {head_dim}",
        setting.call(query, batch),
        device,
        num_bytes=2 * tokens * kv_heads * head_dim * setting.pool.element_size() + 2 * query.nbytes,
        flops=4 * pairs * heads * head_dim,
    )


def _tiles(setting: Setting, runs: list[tuple[int, int]], most: int) -> PagedRows:
    """Rows of the runs (start, rows), one sequence each, cut into tiles."""
    sequence, position, first, counts = list[int](), list[int](), list[int](), list[int]()
    for number, (start, rows) in enumerate(runs):
        for begin in range(start, start + rows, most):
            first.append(len(position))
            counts.append(min(most, start + rows - begin))
            position.extend(range(begin, begin + counts[-1]))
            sequence.extend([number] * counts[-1])

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, device=setting.device, dtype=torch.int32)

    return PagedRows(
        setting.tables,
        on_device(sequence),
        on_device(position),
        on_device(first),
        on_device(counts),
        max(setting.contexts),
        most,
    )
