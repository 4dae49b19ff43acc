"""What one sequence has in the KV cache: watermarks, cells, exit states, and which settings wrote what.

    tokens      0........10........20....26 | next
    segment 0   ##########################  |          watermark[0] = 26
    segment 1   ####################........|          watermark[1] = 20
    segment 2   ##########..................|          watermark[2] = 10
    resume      0         2         1       |          tokens 10..20 kept their state at exit 2, 20..26 at exit 1

A promotion to exit 3 refills segments 2 for tokens 10..20 and 1, 2 for tokens 20..26, each from its resume layer.
Nothing here allocates or frees; `kv.py` does.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sortserve.engine.pages import Cell, KVGeometry
from sortserve.engine.plan import Ints, Span
from sortserve.engine.prefix import chain_key, root_key

KeyKind = Literal["kv", "states", "tokens"]


class SequenceKV:
    """Bookkeeping of one sequence. Segments and exits are numbered as in the ladder; exit e lies below segment e.

    `settings[s, t]` is the id of the layer settings that computed token t's K/V in segment s, -1 if that was never done.
    It outlives the pages: a recompute after preemption or release replays it.
    """

    def __init__(self, geometry: KVGeometry, capacity: int) -> None:
        segments = geometry.num_segments
        self.geometry = geometry
        self.watermark = [0] * segments
        self.cells: list[list[Cell]] = [[] for _ in range(segments)]
        self.states: dict[tuple[int, int], Cell] = {}
        self.settings: NDArray[np.int16] = np.full((segments, capacity), -1, np.int16)
        self.resume: NDArray[np.int16] = np.zeros(capacity, np.int16)
        self.published = [0] * segments  # blocks offered to the prefix index so far
        self.table: Ints = np.zeros((geometry.num_blocks(capacity), geometry.num_columns), np.int32)
        self._uniform = [0] * segments  # leading tokens known to share the first token's settings
        self._keys: dict[tuple[KeyKind, tuple[int, ...]], list[bytes]] = {}

    # ---- cells

    def put(self, segment: int, block: int, cell: Cell) -> Cell | None:
        """Own `cell` as that block's; returns the one it replaces."""
        cells = self.cells[segment]
        self.table[block, self.geometry.columns(segment)] = cell.pages
        if block == len(cells):
            cells.append(cell)
            return None
        replaced, cells[block] = cells[block], cell
        return replaced

    def take_cells(self, first_segment: int) -> list[Cell]:
        """Give up all cells of segments >= first_segment, last block first, deepest segment first."""
        taken: list[Cell] = []
        for segment in range(self.geometry.num_segments - 1, first_segment - 1, -1):
            taken.extend(reversed(self.cells[segment]))
            self.cells[segment] = []
            self.watermark[segment] = 0
            self.published[segment] = 0
        return taken

    def take_states(self, above_exit: int = 0) -> list[Cell]:
        """Give up all states kept at exits > above_exit; their tokens resume at layer 0."""
        doomed = [place for place in self.states if place[1] > above_exit]
        self.resume[self.resume > above_exit] = 0
        return [self.states.pop(place) for place in doomed]

    def take_stale_states(self, start: int, stop: int) -> list[Cell]:
        """Give up states in the blocks of [start, stop) that no token resumes from any more."""
        block_tokens = self.geometry.block_tokens
        taken: list[Cell] = []
        if not self.states:
            return taken
        blocks = range(start // block_tokens, self.geometry.num_blocks(stop))
        for block, exit in [place for place in self.states if place[0] in blocks]:
            tokens = self.resume[block * block_tokens : (block + 1) * block_tokens]
            if not (tokens == exit).any():
                taken.append(self.states.pop((block, exit)))
        return taken

    @property
    def resumes(self) -> bool:
        """Whether the next token to be deepened has its state; the others are likely to be like it."""
        next_token = self.watermark[-1]
        return bool(self.states) and next_token < len(self.resume) and int(self.resume[next_token]) > 0

    # ---- what has to run

    def spans(self, exit: int, stop: int, target: tuple[int, ...], max_cost: int) -> tuple[list[Span], int]:
        """Rows that bring tokens [watermark[exit - 1], stop) to `exit`, as many from the left as `max_cost` allows.

        `target[s]`: settings for K/V of segment s that were never computed; what was recorded is replayed.
        Returns the spans and their cost in rows x layers.
        """
        start = self.watermark[exit - 1]
        bounds = self.geometry.bounds
        if stop - start == 1:  # the common case, one decoded token, without arrays
            first = self._first_segment(start, exit)
            settings = tuple(
                wanted if (known := int(self.settings[segment, start])) < 0 else known
                for segment, wanted in enumerate(target[:exit])
            )
            cost = bounds[exit] - bounds[first]
            return ([Span(start, stop, first, exit, settings)], cost) if cost <= max_cost else ([], 0)
        depth_there = np.zeros(stop - start, np.int16)  # segments whose K/V the token has
        for segment in range(exit):
            depth_there[: max(0, self.watermark[segment] - start)] += 1
        resume = self.resume[start:stop]
        first_segments = np.where(resume <= depth_there, resume, 0)
        costs = np.cumsum(bounds[exit] - np.asarray(bounds)[first_segments])
        num_rows = int(np.searchsorted(costs, max_cost, side="right"))
        if num_rows == 0:
            return [], 0
        recorded = self.settings[:exit, start : start + num_rows]
        effective = np.where(recorded >= 0, recorded, np.asarray(target[:exit], np.int16)[:, None])
        kind = np.vstack([effective, first_segments[None, :num_rows]])  # [exit + 1, num_rows]
        cuts = np.flatnonzero((kind[:, 1:] != kind[:, :-1]).any(axis=0)) + 1
        edges = [0, *cuts.tolist(), num_rows]
        spans = [
            Span(start + a, start + b, int(first_segments[a]), exit, tuple(effective[:, a].tolist()))
            for a, b in pairwise(edges)
        ]
        return spans, int(costs[num_rows - 1])

    def _first_segment(self, token: int, exit: int) -> int:
        there = sum(1 for segment in range(exit) if self.watermark[segment] > token)
        resume = int(self.resume[token])
        return resume if resume <= there else 0

    def refill_rows(self, exit: int) -> int:
        """Tokens whose K/V exist in segment 0 but not up to `exit`."""
        return max(0, self.watermark[0] - self.watermark[exit - 1])

    # ---- what has run

    def record(self, exit: int, spans: Sequence[Span], *, states_kept: bool) -> None:
        """The rows of `spans` have run: raise the watermarks, note settings and where their states are."""
        start, stop = spans[0].start, spans[-1].stop
        assert start == self.watermark[exit - 1], "rows must start at the watermark"
        if stop - start == 1:  # the common case: scalars, where slices of arrays take 4 us
            for segment, chosen in enumerate(spans[0].settings):
                self.settings[segment, start] = chosen
                if self.watermark[segment] < stop:
                    self.watermark[segment] = stop
            if exit == self.geometry.num_segments:
                self.resume[start] = 0
            elif states_kept:
                self.resume[start] = exit
            return
        for span in spans:
            self.settings[:exit, span.start : span.stop] = np.asarray(span.settings, np.int16)[:, None]
        for segment in range(exit):
            self.watermark[segment] = max(self.watermark[segment], stop)
        if exit == self.geometry.num_segments:
            self.resume[start:stop] = 0
        elif states_kept:
            self.resume[start:stop] = exit

    def first_difference(self, target: Sequence[int], num_tokens: int) -> int | None:
        """First segment in which some token's recorded settings are not `target`'s; None if there is none."""
        for segment, wanted in enumerate(target):
            recorded = self.settings[segment, :num_tokens]
            if ((recorded >= 0) & (recorded != wanted)).any():
                return segment
        return None

    def forget_settings(self, first_segment: int) -> None:
        """Drop what was recorded in segments >= first_segment: it will be computed anew with other settings."""
        self.settings[first_segment:] = -1
        for segment in range(first_segment, self.geometry.num_segments):
            self._uniform[segment] = 0

    # ---- keys of whole blocks

    def uniform(self, segment: int, stop: int, wanted: int) -> bool:
        """Whether tokens [0, stop) all have settings `wanted` in `segment`, unrecorded ones not counting against it."""
        known = self._uniform[segment]
        row = self.settings[segment]
        if known > 0 and row[0] != wanted:
            return False
        rest = row[known:stop]
        matches = rest == wanted
        self._uniform[segment] += int(matches.argmin()) if not matches.all() else len(rest)
        return bool((matches | (rest == -1)).all())

    def block_key(self, kind: KeyKind, settings: tuple[int, ...], block: int, tokens: Sequence[int]) -> bytes:
        """Key of a block computed throughout with `settings` (ids of segments 0, 1, ..) or, for kind `tokens`, of its
        tokens alone; `tokens` are all tokens of the sequence."""
        keys = self._keys.setdefault((kind, settings), [])
        size = self.geometry.block_tokens
        while len(keys) <= block:
            begin = len(keys) * size
            parent = keys[-1] if keys else root_key(kind, settings)
            keys.append(chain_key(parent, tokens[begin : begin + size]))
        return keys[block]
