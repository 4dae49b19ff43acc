"""The model's forward on static buffers: a segment, or the head. What is captured in graphs, and also what runs without.

Nothing here looks at a plan or waits for the device. Every size comes from the arguments, every index from the buffers,
so that one captured call serves every mix of depths, widths, contexts and refills of so many rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.engine.cuda.buffers import StepBuffers
from sortserve.engine.cuda.weights import DeviceLayer, DeviceWeights, Matrix
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.rope import rope_table
from sortserve.engine.settings import SettingsTable
from sortserve.kernels.gpu.attention import AttentionLayer, AttentionScratch, PagedRows
from sortserve.kernels.gpu.backends import AttentionCall
from sortserve.kernels.gpu.ffn import staircase_ffn
from sortserve.kernels.gpu.linear import linear
from sortserve.kernels.gpu.norm import add_rms_norm, gather_norm, rms_norm
from sortserve.kernels.gpu.rope_write import rope_and_write
from sortserve.kernels.gpu.sampling import argmax


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Of each row: logits in the model's dtype [rows, vocab], the best token's id and its log-probability."""

    logits: Tensor
    ids: Tensor  # int64 [rows]
    logprobs: Tensor  # float32 [rows]


class Forward:
    """Weights, pool and page tables on one device, and the arithmetic on them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DeviceWeights,
        geometry: KVGeometry,
        settings: SettingsTable,
        pool: Tensor,
        tables: Tensor,  # [columns, seats, blocks]
        max_model_len: int,
        attention: AttentionCall,
        scratch: AttentionScratch | None = None,
    ) -> None:
        self.weights = weights
        self.pool = pool
        self._states = pool.view(-1).view(weights.embedding.dtype)  # the same memory, as states lie in it
        self._config = config
        self._geometry = geometry
        self._tables = tables
        self._max_context = max_model_len
        self._scratch = scratch
        self._attention = attention
        kv_heads, page_layers = config.shape.num_kv_heads, geometry.page_layers
        self._attention_layers = [
            AttentionLayer(page_layers, number, kv_heads, config.sliding_window) for number in range(page_layers)
        ]
        cos, sin = rope_table(config.rope, config.shape.head_dim, max_model_len)
        self._cos, self._sin = cos.to(pool.device).contiguous(), sin.to(pool.device).contiguous()
        # whether some sub-model skips the layer's attention: only then can an output bias be in the way
        self._may_skip = [
            any(not settings.settings(segment, number)[offset][1] for number in range(settings.num_settings(segment)))
            for segment in range(geometry.num_segments)
            for offset in range(geometry.segment_layers(segment))
        ]

    def segment(self, segment: int, rows: int, buffers: StepBuffers, tiles: int = 0, tile_rows: int = 1) -> None:
        """Run a segment for its first `rows` rows: input by `source`, output to `hidden`, leavers to `exits`.

        `tile_rows` 1: every row attends by itself. Else by `tiles` tiles of up to so many rows.
        """
        index, start, end = buffers.device, self._geometry.bounds[segment], self._geometry.bounds[segment + 1]
        if segment == 0:
            hidden = self.weights.embedding.index_select(0, index["tokens"][:rows])
        else:
            hidden = buffers.hidden.index_select(0, index["source"][segment, :rows])
        for layer in range(start, end):
            # rows whose output nobody needs may be among them: they are skipped by width 0 and position -1
            target = buffers.hidden[:rows] if layer == end - 1 else None
            hidden = self._layer(hidden, segment, layer, index, (rows, tiles or rows, tile_rows), target)
        buffers.exits.index_copy_(0, index["exit_slot"][segment, :rows], hidden)

    def _layer(
        self,
        hidden: Tensor,
        segment: int,
        layer: int,
        index: dict[str, Tensor],
        sizes: tuple[int, int, int],
        target: Tensor | None,
    ) -> Tensor:
        weights, (rows, tiles, tile_rows) = self.weights.layers[layer], sizes
        column, layer_in_page = divmod(layer, self._geometry.page_layers)
        query = self._queries(weights, hidden, column, layer_in_page, index["position"][segment, :rows], index)
        attends = index["attend"][layer, :rows]
        attended = self._attention(
            query,
            self.pool,
            PagedRows(
                self._tables[column],
                index["sequence"][segment, :rows],
                attends,
                index["tile_first"][segment, :tiles],
                index["tile_rows"][segment, :tiles],
                self._max_context,
                tile_rows,
                whole=True,
            ),
            self._attention_layers[layer_in_page],
            scratch=self._scratch,
        )
        output = weights.output
        projected = _apply(attended, output)
        if output.bias is not None and self._may_skip[layer]:
            projected = projected * (attends >= 0)[:, None]  # a row that does not attend gets no bias either
        normed, hidden = add_rms_norm(projected, hidden, weights.post_norm, self._config.rms_eps)
        return staircase_ffn(
            normed,
            weights.ffn,
            index["width"][layer, :rows],
            hidden,
            activation=self._config.activation,
            out=target,
        )

    def _queries(
        self,
        weights: DeviceLayer,
        hidden: Tensor,
        column: int,
        layer_in_page: int,
        positions: Tensor,
        index: dict[str, Tensor],
    ) -> Tensor:
        """Write the layer's K/V; the rotated queries [rows, heads, head_dim]. A layer whose attention a row skips writes
        its K/V all the same, so that rows that do attend here find them."""
        shape = self._config.shape
        return rope_and_write(
            _apply(rms_norm(hidden, weights.input_norm, self._config.rms_eps), weights.qkv),
            self._cos,
            self._sin,
            positions,
            index["slots"][column, : positions.shape[0]],
            self.pool,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            page_layers=self._geometry.page_layers,
            layer_in_page=layer_in_page,
            query_norm=weights.query_norm,
            key_norm=weights.key_norm,
            eps=self._config.rms_eps,
        )

    def head(self, rows: int, buffers: StepBuffers) -> HeadOutput:
        """Logits of the first `rows` of `logit_rows`, after the final norm, and the best token of each."""
        index = buffers.device["logit_rows"][:rows]
        normed = gather_norm(buffers.exits, index, self.weights.final_norm, self._config.rms_eps)
        logits = _apply(normed, self.weights.head)
        ids, logprobs = argmax(logits)
        return HeadOutput(logits, ids, logprobs)

    # ---- states

    def load_states(self, count: int, pieces: int, buffers: StepBuffers) -> None:
        """Put `count` kept states, of so many pool pieces each, where rows that enter find them."""
        size = self._geometry.hidden_size // pieces
        states = self._states.view(-1, size).index_select(0, buffers.device["state_read"][: count * pieces])
        buffers.hidden[buffers.rows : buffers.rows + count] = states.view(count, -1)

    def store_states(self, count: int, pieces: int, buffers: StepBuffers) -> None:
        """Keep the states of `count` rows that left."""
        size = self._geometry.hidden_size // pieces
        states = buffers.exits.index_select(0, buffers.device["state_source"][:count])
        self._states.view(-1, size).index_copy_(
            0, buffers.device["state_write"][: count * pieces], states.view(-1, size)
        )


def _apply(x: Tensor, matrix: Matrix) -> Tensor:
    return linear(x, matrix.weight, matrix.bias, matrix.scale)


def new_pool(geometry: KVGeometry, num_pages: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The pool of pages, zeros: [num_pages * 2 * page layers, block tokens, kv width], of the model's dtype or of fp8 with
    a scale of 1 (what is beyond +-448 is cut off there), as the geometry says."""
    kept = dtype if geometry.kv_value_bytes == dtype.itemsize else torch.float8_e4m3fn
    assert kept.itemsize == geometry.kv_value_bytes, (kept, geometry)
    memory = torch.zeros(num_pages * geometry.page_bytes, dtype=torch.uint8, device=device)
    return memory.view(kept).view(-1, geometry.block_tokens, geometry.kv_width)
