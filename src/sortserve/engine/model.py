"""The model's forward over one segment: layers of any width and skip per row, over paged K/V.

One function serves prompts, decode and refill: rows differ only in what the batch says of them.
"""

import torch
from torch import Tensor

from sortserve.engine.batch import BatchBuilder, SegmentBatch
from sortserve.engine.config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.rope import rope_table
from sortserve.engine.settings import SettingsTable
from sortserve.engine.weights import LayerWeights, ModelWeights
from sortserve.kernels.attention import AttentionRows, attend, write
from sortserve.kernels.native_layers import LayersShape, NativeLayers
from sortserve.kernels.rope import rotate


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
        self._native = self._native_layers()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, hidden]."""
        return self.weights.embedding.index_select(0, tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """Exit rows [rows, hidden], before the final norm -> float32 logits [rows, vocab]."""
        return self.weights.head(self.weights.final_norm(hidden)).float()

    def _native_layers(self) -> NativeLayers | None:
        """The layers as one call, where all products are our own."""
        if not all(layer.is_native for layer in self.weights.layers):
            return None
        shape, geometry = self.config.shape, self._geometry
        common = LayersShape(
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            geometry.block_tokens,
            geometry.page_layers,
            self.config.sliding_window,
        )
        return NativeLayers(self.weights.layers, common, self._rotations)

    def run_segment(self, hidden: Tensor, batch: SegmentBatch, pool: Tensor) -> Tensor:
        """hidden [batch.num_rows, hidden] through the segment's layers, writing K/V into `pool`.

        In the last layer only the rows of `batch.last` go on after their K/V are written; these are returned.
        """
        start, end = self._geometry.bounds[batch.segment], self._geometry.bounds[batch.segment + 1]
        by_id = [self._settings.settings(batch.segment, settings_id) for settings_id in batch.settings]
        if self._native is not None:
            chosen = self._builder.layer_rows(batch, by_id, self._native.settings)
            out = self._native.run(start, hidden, batch.attention, pool, chosen)
            return out if batch.last is None else out[batch.last]
        rows = batch.attention
        rotation = self._rotations[rows.positions]
        for layer in range(start, end):
            weights, offset = self.weights.layers[layer], layer - start
            last = batch.last if layer == end - 1 else None
            attending = [settings[offset][1] for settings in by_id]
            query = self._write_keys_values(weights, hidden, rotation, rows, offset, pool)
            if last is not None:
                hidden, query, rows = hidden[last], query[last], rows.only(last)
                if hidden.shape[0] == 0:
                    return hidden
            if any(attending):
                attended = attend(query, pool, rows, offset, self.config.shape.num_kv_heads)
                if all(attending):
                    hidden = weights.output.add_to(hidden, attended)
                else:
                    hidden = hidden + weights.output(attended) * batch.choose(attending, last is not None, hidden.dtype)
            widths = tuple(settings[offset][0] for settings in by_id)
            ffn_rows = self._builder.ffn_rows(batch, widths, weights.ffn.boundaries, last is not None)
            if ffn_rows.widest:
                hidden = weights.ffn.add_to(hidden, weights.post_norm(hidden), ffn_rows)
        return hidden

    def _write_keys_values(
        self, weights: LayerWeights, hidden: Tensor, rotation: Tensor, rows: AttentionRows, offset: int, pool: Tensor
    ) -> Tensor:
        """Write the K/V of the segment's layer `offset`; returns the rotated queries [rows, heads, head_dim].

        A layer whose attention is skipped writes K/V all the same, so that rows that do attend here find them.
        """
        shape = self.config.shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        heads = weights.qkv(weights.input_norm(hidden)).view(-1, num_rotated + shape.num_kv_heads, shape.head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if weights.query_norm is not None and weights.key_norm is not None:
            query, key = rotated[:, : shape.num_heads], rotated[:, shape.num_heads :]
            rotated = torch.cat([weights.query_norm(query), weights.key_norm(key)], dim=1)
        rotated = rotate(rotated, rotation)
        write(rotated[:, shape.num_heads :], value, pool, rows, offset)
        return rotated[:, : shape.num_heads]
