"""Static buffers of a step: what the host says about its rows, in a pinned block that goes over in one copy, and the
hidden states between segments.

Everything a captured graph reads or writes lies here, at addresses that never change. R is the capacity in rows. Rows
that a padded call runs beyond the real ones hold the padding value: they read nothing, write nowhere, and cost nothing.
"""

from collections.abc import Sequence
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
        Field("late_row", (rows,), np.int64, 0),  # rows of segment 0 whose id the step before draws
        Field("late_from", (rows,), np.int64, 0),  # its row of logits there
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


class HostBlock:
    """The arrays on the host, in pinned memory, with padding in all of them. May be written again once `free` returns."""

    def __init__(self, fields: Sequence[Field], offsets: Sequence[int], device: torch.device) -> None:
        self.block = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.arrays: Host = {}
        for field, offset in zip(fields, offsets, strict=False):
            stop = offset + prod(field.shape) * np.dtype(field.dtype).itemsize
            self.arrays[field.name] = self.block[offset:stop].numpy().view(field.dtype).reshape(field.shape)
        self._fields = fields
        self._sent: torch.cuda.Event | None = None
        self.clear()

    def clear(self) -> None:
        """Padding everywhere."""
        for field in self._fields:
            self.arrays[field.name].fill(field.padding)

    def send(self, target: Tensor) -> None:
        """Copy the block, without waiting."""
        target.copy_(self.block, non_blocking=True)
        if target.is_cuda:
            self._sent = self._sent or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()

    def free(self) -> None:
        """Wait until what was sent last has left."""
        if self._sent is not None:
            self._sent.synchronize()


class StepBuffers:
    """`host` and `device` hold the same arrays by name; `hidden` the rows between segments, entrants from row R on;
    `exits` the rows that left, before the final norm, row R a dump.

    On the host there are two sets: one is written while the other one's step, launched before, may still wait for its turn
    on the device, where one set does, since steps follow each other there."""

    def __init__(
        self, geometry: KVGeometry, rows: int, state_pieces: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = rows
        fields = fields_of(geometry, rows, state_pieces)
        sizes = [-(-prod(field.shape) * np.dtype(field.dtype).itemsize // 16) * 16 for field in fields]
        offsets = np.cumsum([0, *sizes]).tolist()
        self._now, self._other = (HostBlock(fields, offsets, device) for _ in range(2))
        self._device_block = torch.zeros(offsets[-1], dtype=torch.uint8, device=device)
        self.device: dict[str, Tensor] = {}
        for field, offset in zip(fields, offsets, strict=False):
            stop = offset + prod(field.shape) * np.dtype(field.dtype).itemsize
            kind = torch.int64 if field.dtype is np.int64 else torch.int32
            self.device[field.name] = self._device_block[offset:stop].view(kind).view(field.shape)
        self.hidden = torch.zeros(2 * rows, geometry.hidden_size, dtype=dtype, device=device)
        self.exits = torch.zeros(rows + 1, geometry.hidden_size, dtype=dtype, device=device)
        self.upload()  # a call before the first step finds padding, and writes nothing

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device_block.nbytes + self.hidden.nbytes + self.exits.nbytes

    @property
    def host(self) -> Host:
        """The arrays that are written now."""
        return self._now.arrays

    def clear(self) -> None:
        """Take the set of the step before the last one, and put padding everywhere."""
        self._now, self._other = self._other, self._now
        self._now.free()
        self._now.clear()

    def upload(self) -> None:
        """Send all arrays in one copy, without waiting."""
        self._now.send(self._device_block)
