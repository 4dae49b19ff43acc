"""The model's forward over one segment: layers of any width and skip per row, over paged K/V.

One function serves prompts, decode and refill: rows differ only in what the batch says of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.engine.batch import BatchBuilder, SegmentBatch
from sortserve.engine.config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.rope import rope_table
from sortserve.engine.settings import SettingsTable
from sortserve.engine.weights import LayerWeights, ModelWeights
from sortserve.kernels.attention import AttentionRows, attend
from sortserve.kernels.norm import rms_norm
from sortserve.kernels.rope import rotate


@dataclass(frozen=True, slots=True)
class _LayerRows:
    """What one layer call needs beside the weights and the hidden rows."""

    rotation: Tensor  # complex64 [rows, 1, head_dim / 2]
    write_rows: Tensor | None
    write_slots: Tensor  # [2 x writers], of this layer
    attention: AttentionRows
    page: int
    layer_in_page: int
    last: Tensor | None  # rows to go on with after K/V are written; None: all
    attention_on: Tensor | bool  # [rows, 1] 0 or 1, or one answer for all
    ffn_key: tuple[tuple[int, ...], bool]  # widths by settings, and whether only the `last` rows run


class Model:
    """Weights and the arithmetic on them. Holds no state of any request."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        geometry: KVGeometry,
        settings: SettingsTable,
        builder: BatchBuilder,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.weights = weights
        self._geometry = geometry
        self._settings = settings
        self._builder = builder
        cos, sin = rope_table(config.rope, config.shape.head_dim, max_model_len)
        self._rotations = torch.complex(cos, sin)[:, None]  # [max_model_len, 1, head_dim / 2]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, hidden]."""
        return self.weights.embedding.index_select(0, tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """Exit rows [rows, hidden], before the final norm -> float32 logits [rows, vocab]."""
        normed = rms_norm(hidden, self.weights.final_norm, self.config.rms_eps)
        return self.weights.head(normed).float()

    def run_segment(self, hidden: Tensor, batch: SegmentBatch, pool: Tensor) -> Tensor:
        """hidden [batch.num_rows, hidden] through the segment's layers, writing K/V into `pool`.

        Returns the rows of `batch.last` (all if None).
        """
        start, end = self._geometry.bounds[batch.segment], self._geometry.bounds[batch.segment + 1]
        rotation = self._rotations[batch.positions]
        per_page = self._geometry.page_layers
        slots_per_layer = self._geometry.block_tokens
        for layer in range(start, end):
            page, layer_in_page = divmod(layer - start, per_page)
            is_last = layer == end - 1
            slots = batch.write_slots[page]
            rows = _LayerRows(
                rotation=rotation,
                write_rows=batch.write_rows,
                write_slots=slots + layer_in_page * slots_per_layer if layer_in_page else slots,
                attention=batch.last_attention if is_last else batch.attention,
                page=page,
                layer_in_page=layer_in_page,
                last=batch.last if is_last else None,
                attention_on=self._attention_on(batch, layer - start, is_last),
                ffn_key=(self._widths(batch, layer - start), is_last),
            )
            hidden = self._layer(self.weights.layers[layer], hidden, rows, batch, pool)
        return hidden

    def _widths(self, batch: SegmentBatch, layer_in_segment: int) -> tuple[int, ...]:
        return tuple(self._settings.settings(batch.segment, i)[layer_in_segment][0] for i in batch.settings)

    def _attention_on(self, batch: SegmentBatch, layer_in_segment: int, is_last: bool) -> Tensor | bool:
        on = [self._settings.settings(batch.segment, i)[layer_in_segment][1] for i in batch.settings]
        if all(on) or not any(on):
            return on[0]
        rows = torch.tensor(on)[torch.from_numpy(batch.rows_settings).long()]
        if is_last and batch.last is not None:
            rows = rows[batch.last]
        return rows[:, None].to(self._builder.dtype)

    def _layer(
        self, weights: LayerWeights, hidden: Tensor, rows: _LayerRows, batch: SegmentBatch, pool: Tensor
    ) -> Tensor:
        """One layer. A skipped attention still writes K/V, so that rows that do attend here find them."""
        eps, shape = self.config.rms_eps, self.config.shape
        normed = rms_norm(hidden, weights.input_norm, eps)
        self._write_keys_values(weights, normed, rows, pool)
        rotation = rows.rotation
        if rows.last is not None:
            hidden, normed, rotation = hidden[rows.last], normed[rows.last], rotation[rows.last]
            if hidden.shape[0] == 0:
                return hidden
        if rows.attention_on is not False:
            query = weights.query(normed).view(-1, shape.num_heads, shape.head_dim)
            if weights.query_norm is not None:
                query = rms_norm(query, weights.query_norm, eps)
            attended = attend(
                rotate(query, rotation), pool, rows.attention, rows.page, rows.layer_in_page, shape.num_kv_heads
            )
            if rows.attention_on is True:
                hidden = weights.output.add_to(hidden, attended)
            else:
                hidden = hidden + weights.output(attended) * rows.attention_on
        widths, is_last = rows.ffn_key
        ffn_rows = self._builder.ffn_rows(batch, widths, weights.ffn.boundaries, is_last)
        if not ffn_rows.blocks:
            return hidden
        return weights.ffn.add_to(hidden, rms_norm(hidden, weights.post_norm, eps), ffn_rows)

    def _write_keys_values(self, weights: LayerWeights, normed: Tensor, rows: _LayerRows, pool: Tensor) -> None:
        shape = self.config.shape
        rotation = rows.rotation
        if rows.write_rows is not None:
            if rows.write_rows.numel() == 0:
                return
            normed, rotation = normed[rows.write_rows], rotation[rows.write_rows]
        both = weights.key_value(normed).view(-1, 2, shape.num_kv_heads, shape.head_dim)
        key = both[:, 0]
        if weights.key_norm is not None:
            key = rms_norm(key, weights.key_norm, self.config.rms_eps)
        both[:, 0] = rotate(key.contiguous(), rotation)
        kv_width = shape.num_kv_heads * shape.head_dim
        pool.view(-1, kv_width).index_copy_(0, rows.write_slots, both.view(-1, kv_width))
