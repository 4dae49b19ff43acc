"""Which attention a runner calls: measured once at start on its own pool, for decode rows and for chunks by themselves."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.kernels.gpu.attention import AttentionLayer, PagedRows, rows_per_tile
from sortserve.kernels.gpu.backends import AttentionCall, Choice, by_rows, fastest, offers

logger = logging.getLogger(__name__)

TRIAL_ROWS, TRIAL_CONTEXT = 32, 1024
"""Decode rows, and tokens that each sees; a chunk is a quarter of so many tokens over the rest."""


@dataclass(frozen=True, slots=True)
class Attention:
    """What was chosen."""

    decode: Choice
    chunks: Choice

    @property
    def call(self) -> AttentionCall:
        """For both kinds of rows."""
        return by_rows(self.decode.call, self.chunks.call)

    @property
    def words(self) -> str:
        """What is told in the log and in answers."""
        if self.decode.name == self.chunks.name:
            return f"attention by {self.decode.name}"
        return f"attention of single rows by {self.decode.name}, of chunks by {self.chunks.name}"


def choose_attention(
    model: ModelConfig, geometry: KVGeometry, pool: Tensor, dtype: torch.dtype, max_running: int, max_model_len: int
) -> Attention:
    """The fastest of our kernels and of the libraries that are there. The pool, which nobody uses yet, holds zeros again
    afterwards."""
    shape, device, size = model.shape, pool.device, geometry.block_tokens
    offered = offers(device, shape.head_dim, pool.dtype)
    layer = AttentionLayer(geometry.page_layers, 0, shape.num_kv_heads, model.sliding_window)
    pages = pool.view(-1, 2, geometry.page_layers, *pool.shape[1:])
    rows = max(1, min(max_running, TRIAL_ROWS, len(pages)))
    blocks = max(1, min(TRIAL_CONTEXT // size, geometry.num_blocks(max_model_len), len(pages) // rows))
    only_ours = sum(offer.call is not None for offer in offered) == 1
    if not only_ours:
        pages[: rows * blocks, :, 0].normal_()
    tables = torch.arange(rows * blocks, dtype=torch.int32, device=device).view(rows, blocks)
    chunk, tile = max(1, blocks // 4) * size, rows_per_tile(shape.num_heads, shape.num_kv_heads, shape.head_dim)

    def query(count: int) -> Tensor:
        return torch.randn(count, shape.num_heads, shape.head_dim, dtype=dtype, device=device)

    attention = Attention(
        fastest(offered, query(rows), pool, _decode(tables, blocks * size), layer),
        fastest(offered, query(chunk), pool, _chunk(tables, blocks * size, chunk, tile), layer),
    )
    if not only_ours:
        pages[: rows * blocks, :, 0].zero_()
    for what, choice in (("single rows", attention.decode), ("chunks", attention.chunks)):
        others = "; ".join(f"{name}: {reason}" for name, reason in sorted(choice.reasons.items()))
        logger.info("attention of %s by %s (%s)", what, choice.name, others)
    return attention


def _decode(tables: Tensor, context: int) -> PagedRows:
    """The last row of every sequence."""
    rows = torch.arange(len(tables), dtype=torch.int32, device=tables.device)
    return PagedRows(tables, rows, torch.full_like(rows, context - 1), rows, torch.ones_like(rows), context)


def _chunk(tables: Tensor, context: int, count: int, tile: int) -> PagedRows:
    """The last `count` rows of the first sequence."""
    rows = torch.arange(count, dtype=torch.int32, device=tables.device)
    first = rows[::tile].contiguous()
    lengths = (count - first).clamp_max(tile)
    position = rows + (context - count)
    return PagedRows(tables, torch.zeros_like(rows), position, first, lengths, context, tile, whole=True)
