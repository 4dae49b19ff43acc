"""Page tables on the device: a seat for every sequence, changed only where its pages changed.

    tables[column, seat, block] = page      a column is one page of a block's cell (pages.py)

A step of 64 sequences changes about four of them (a new block every 16 tokens), so what is sent is a list of places and
numbers, not the tables. A mirror on the host says what the device has; rows look their pages up there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sortserve.engine.plan import Ints, SequencePlan

Longs = NDArray[np.int64]


class PageTables:
    """`device` [columns, seats, blocks] int32, `mirror` the same on the host once `seat` has returned."""

    def __init__(self, num_columns: int, num_seats: int, num_blocks: int, device: torch.device) -> None:
        self.device = torch.zeros(num_columns, num_seats, num_blocks, dtype=torch.int32, device=device)
        self.mirror: Ints = np.zeros(self.device.shape, np.int32)
        self._free = list(range(num_seats - 1, -1, -1))
        # by request, least recently used first; the pages last seen are kept, so that their identity proves them equal
        self._seats: dict[str, tuple[int, Ints]] = {}
        self._last: tuple[list[str], Longs, list[Ints]] = [], np.empty(0, np.int64), []  # names, seats and pages

    def seat(self, parts: Sequence[SequencePlan]) -> Longs:
        """A seat for each of the sequences, its table up to date on the device before anything that is launched later."""
        names = [part.request_id for part in parts]
        if names == self._last[0]:  # the common case: nobody came or left
            return self._again(parts)
        known = [self._seats.pop(name, None) for name in names]  # out of the reach of `_take`
        seats = np.empty(len(parts), np.int64)
        places: list[Longs] = []
        for number, part in enumerate(parts):
            seat, pages = known[number] or (self._take(), None)
            if pages is not part.pages:
                places.append(self._changed(seat, part.pages))
            self._seats[part.request_id] = seat, part.pages
            seats[number] = seat
        self._send(places)
        self._last = names, seats, [part.pages for part in parts]
        return seats

    def _again(self, parts: Sequence[SequencePlan]) -> Longs:
        """The seats of the same sequences as last time, whose order of use is that of then."""
        _, seats, pages = self._last
        places: list[Longs] = []
        for number, part in enumerate(parts):
            if part.pages is not pages[number]:
                seat = int(seats[number])
                places.append(self._changed(seat, part.pages))
                self._seats[part.request_id] = seat, part.pages
                pages[number] = part.pages
        self._send(places)
        return seats

    def _take(self) -> int:
        if not self._free:
            assert self._seats, "more sequences in a step than seats"
            seat, _ = self._seats.pop(next(iter(self._seats)))
            return seat
        return self._free.pop()

    def _changed(self, seat: int, pages: Ints) -> Longs:
        """Bring the mirror up to date; flat places that changed."""
        table = self.mirror[:, seat, : len(pages)]
        columns, blocks = np.nonzero(table != pages.T)
        table[columns, blocks] = pages[blocks, columns]
        _, num_seats, num_blocks = self.mirror.shape
        places: Longs = (columns * num_seats + seat) * num_blocks + blocks
        return places

    def _send(self, changed: Sequence[Longs]) -> None:
        places = np.concatenate(changed) if changed else np.empty(0, np.int64)
        if not len(places):
            return
        both = torch.empty(2, len(places), dtype=torch.int64, pin_memory=self.device.is_cuda)
        both[0] = torch.from_numpy(places)
        both[1] = torch.from_numpy(self.mirror.reshape(-1)[places])
        sent = both.to(self.device.device, non_blocking=True)
        self.device.view(-1).index_copy_(0, sent[0], sent[1].int())
