"""Static buffers of a step: what the host says about its rows, in one pinned block that goes over in one copy, and the
hidden states between segments.

Everything a captured graph reads or writes lies here, at addresses that never change. R is the capacity in rows. Rows
that a padded call runs beyond the real ones hold the padding value: they read nothing, write nowhere, and cost nothing.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.engine.pages import KVGeometry

NOWHERE = -1
Host = dict[str, NDArray[Any]]  # int32 or int64, by name


@dataclass(frozen=True, slots=True)
class Field:
    """An array of the block: its shape, and what rows that are none hold."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.int32] | type[np.int64]
    padding: int


def fields_of(geometry: KVGeometry, rows: int, state_pieces: int) -> tuple[Field, ...]:
    """The arrays for `rows` rows; S segments, C page columns, L layers."""
    segments, columns, layers = geometry.num_segments, geometry.num_columns, geometry.bounds[-1]
    return (
        Field("tokens", (rows,), np.int64, 0),  # [R] ids of the rows of segment 0
        Field("source", (segments, rows), np.int64, 0),  # [S, R] row of `hidden` that a segment's row comes from
        Field("exit_slot", (segments, rows), np.int64, rows),  # [S, R] row of `exits` it leaves to; R: a dump
        Field("slots", (columns, rows), np.int64, NOWHERE),  # [C, R] token slot of the K of the page's layer 0
        Field("logit_rows", (rows,), np.int64, 0),  # rows of `exits` that get logits
        Field("state_read", (rows * state_pieces,), np.int64, 0),  # pool pieces of the states that enter
        Field("state_write", (rows * state_pieces,), np.int64, 0),  # pool pieces of the states to keep
        Field("state_source", (rows,), np.int64, 0),  # rows of `exits` to keep
        Field("position", (segments, rows), np.int32, NOWHERE),  # [S, R]
        Field("sequence", (segments, rows), np.int32, 0),  # [S, R] seat in the page tables
        Field("attend", (layers, rows), np.int32, NOWHERE),  # [L, R] position, -1 where the row does not attend
        Field("width", (layers, rows), np.int32, 0),  # [L, R] FFN neurons
        Field("tile_first", (segments, rows), np.int32, 0),  # [S, tiles]
        Field("tile_rows", (segments, rows), np.int32, 0),  # [S, tiles]
    )


class StepBuffers:
    """`host` and `device` hold the same arrays by name; `hidden` the rows between segments, entrants from row R on;
    `exits` the rows that left, before the final norm, row R a dump."""

    def __init__(
        self, geometry: KVGeometry, rows: int, state_pieces: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = rows
        fields = fields_of(geometry, rows, state_pieces)
        sizes = [-(-prod(field.shape) * np.dtype(field.dtype).itemsize // 16) * 16 for field in fields]
        offsets = np.cumsum([0, *sizes]).tolist()
        self._host_block = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device_block = torch.zeros(offsets[-1], dtype=torch.uint8, device=device)
        self._fields = fields
        self.host: Host = {}
        self.device: dict[str, Tensor] = {}
        for field, offset in zip(fields, offsets, strict=False):
            stop = offset + prod(field.shape) * np.dtype(field.dtype).itemsize
            self.host[field.name] = self._host_block[offset:stop].numpy().view(field.dtype).reshape(field.shape)
            kind = torch.int64 if field.dtype is np.int64 else torch.int32
            self.device[field.name] = self._device_block[offset:stop].view(kind).view(field.shape)
        self.hidden = torch.zeros(2 * rows, geometry.hidden_size, dtype=dtype, device=device)
        self.exits = torch.zeros(rows + 1, geometry.hidden_size, dtype=dtype, device=device)
        self.clear()
        self.upload()  # a call before the first step finds padding, and writes nothing

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device_block.nbytes + self.hidden.nbytes + self.exits.nbytes

    def clear(self) -> None:
        """Padding everywhere. The last upload must be over: the caller has waited for that step's result."""
        for field in self._fields:
            self.host[field.name].fill(field.padding)

    def upload(self) -> None:
        """Send all arrays in one copy, without waiting."""
        self._device_block.copy_(self._host_block, non_blocking=True)
