"""From a plan to arrays: every row of a step, and where it runs, reads, writes and leaves. It computes with numpy alone.

Rows are in the plan's order of sequences, positions ascending. The rows active in a segment keep that order; `source`
tells the device where each one's input lies, so entrants and leavers need no case of their own:

    rows of the step     0 1 2 3 4 5          3, 4 enter at segment 1 (from kept states), 5 leaves there
    active in segment 0  0 1 2 5              hidden[0..4)
    active in segment 1  0 1 2 3 4            source = 0 1 2 R R+1      hidden[R..) are the states
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sortserve.engine.cuda.buffers import Host
from sortserve.engine.cuda.tables import Longs, PageTables
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import Plan, SequencePlan
from sortserve.engine.settings import SettingsTable

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class StepRows:
    """All rows of a step, [rows] each unless said otherwise."""

    parts: tuple[SequencePlan, ...]
    part: Longs  # its sequence's place in the plan
    run: Longs  # number of its span: rows of one span are consecutive, and so are their positions
    position: Longs
    first: Longs  # the segment it enters at
    exit: Longs
    settings: Longs  # [segments, rows] id of the layer settings; 0 where it does not run
    watermark: Longs  # [segments, sequences]
    wanted: Bools  # its output is needed beyond its last layer; of the others only K/V are

    @classmethod
    def of(cls, plan: Plan, geometry: KVGeometry) -> "StepRows":
        """The rows of a plan."""
        segments, parts = geometry.num_segments, plan.sequences
        spans = [(number, span) for number, part in enumerate(parts) for span in part.spans]
        counts = np.array([span.stop - span.start for _, span in spans])
        starts = np.array([span.start for _, span in spans])
        run = np.repeat(np.arange(len(spans)), counts)
        before = np.cumsum(counts) - counts
        position = np.arange(len(run)) - before[run] + starts[run]
        part = np.array([number for number, _ in spans])[run]
        padded = np.array([span.settings + (0,) * (segments - span.exit) for _, span in spans], np.int64)
        marks = np.array([part.watermark + (0,) * (segments - part.exit) for part in parts], np.int64)
        keeps_all = np.array(
            [(p.keep_states and p.exit < segments) or p.prompt_logprobs is not None for p in parts], np.bool_
        )
        sampled = np.array([p.stop - 1 if p.sample is not None else -1 for p in parts])
        return cls(
            parts=parts,
            part=part,
            run=run,
            position=position,
            first=np.array([span.first_segment for _, span in spans])[run],
            exit=np.array([span.exit for _, span in spans])[run],
            settings=padded[run].T,
            watermark=marks.T,
            wanted=keeps_all[part] | (position == sampled[part]),
        )

    def __len__(self) -> int:
        return len(self.part)

    @cached_property
    def longest_run(self) -> int:
        """Rows of the longest span."""
        return int(np.bincount(self.run).max())

    @cached_property
    def exit_number(self) -> Longs:
        """Row of the exit buffer, for rows that are wanted."""
        return np.cumsum(self.wanted) - 1

    @cached_property
    def entry_number(self) -> Longs:
        """Row among the states that enter, for rows that start from one."""
        return np.cumsum(self.first > 0) - 1


@dataclass(frozen=True, slots=True)
class StepCounts:
    """How much of the arrays is real."""

    segments: tuple[int, ...]  # rows active in each
    tiles: tuple[int, ...]  # attention tiles in each
    logits: int
    entrants: int
    kept_states: int


class RowLayout:
    """Fills the host arrays of a step; holds what the ladder says about layers, nothing of any request."""

    def __init__(self, geometry: KVGeometry, settings: SettingsTable) -> None:
        self._geometry = geometry
        by_segment = [
            [settings.settings(segment, number) for number in range(settings.num_settings(segment))]
            for segment in range(geometry.num_segments)
        ]
        # per segment [settings, layers]
        self._widths = [np.array([[width for width, _ in one] for one in known], np.int32) for known in by_segment]
        self._attends = [np.array([[on for _, on in one] for one in known], np.bool_) for known in by_segment]
        self.state_pieces = geometry.hidden_size // geometry.state_piece

    def fill(self, host: Host, capacity: int, rows: StepRows, tables: PageTables, tile_rows: int) -> StepCounts:
        """Write everything about `rows` into `host`, which holds padding. Attention tiles have up to `tile_rows` rows."""
        seats = tables.seat(rows.parts)[rows.part]
        place = np.zeros(len(rows), np.int64)
        segments, tiles = [], []
        for segment in range(int(rows.exit.max())):
            active = np.flatnonzero((rows.first <= segment) & (rows.exit > segment))
            segments.append(len(active))
            tiles.append(0)
            if not len(active):  # only a refill, which enters further up
                continue
            self._segment(host, capacity, rows, segment, active, place, seats[active], tables)
            # a tile is skipped by its first row, so rows that stop short of the last layer's output have tiles of their own
            stops_short = (rows.exit[active] == segment + 1) & ~rows.wanted[active]
            tiles[-1] = _tiles(host, segment, 2 * rows.run[active] + stops_short, tile_rows)
        starting = np.flatnonzero(rows.first == 0)
        host["tokens"][: len(starting)] = _tokens(rows, starting)
        return StepCounts(
            tuple(segments), tuple(tiles), _logits(host, rows), self._entering(host, rows), self._keeping(host, rows)
        )

    def _segment(
        self,
        host: Host,
        capacity: int,
        rows: StepRows,
        segment: int,
        active: Longs,
        place: Longs,
        seats: Longs,
        tables: PageTables,
    ) -> None:
        geometry, count = self._geometry, len(active)
        position = rows.position[active]
        entering = rows.first[active] == segment
        if segment:
            host["source"][segment, :count] = np.where(entering, capacity + rows.entry_number[active], place[active])
        place[active] = np.arange(count)
        leaving, wanted = rows.exit[active] == segment + 1, rows.wanted[active]
        gone = leaving & wanted
        host["exit_slot"][segment, :count][gone] = rows.exit_number[active][gone]
        host["position"][segment, :count] = position
        host["sequence"][segment, :count] = seats

        start, end = geometry.bounds[segment], geometry.bounds[segment + 1]
        ids, ends_here = rows.settings[segment, active], leaving & ~wanted
        host["width"][start:end, :count] = self._widths[segment][ids].T
        host["attend"][start:end, :count] = np.where(self._attends[segment][ids].T, position, -1)
        # whose output nobody needs only writes K/V in its last layer
        host["width"][end - 1, :count][ends_here] = 0
        host["attend"][end - 1, :count][ends_here] = -1

        size = geometry.block_tokens
        pages = tables.mirror[geometry.columns(segment), seats, position // size].astype(np.int64)  # [columns, count]
        slots = pages * (2 * geometry.page_layers * size) + position % size
        writes = position >= rows.watermark[segment, rows.part[active]]
        host["slots"][geometry.columns(segment), :count] = np.where(writes, slots, -1)

    # ---- states

    def _entering(self, host: Host, rows: StepRows) -> int:
        """Where the states are read from that rows start from, in order of rows."""
        entrants = np.flatnonzero(rows.first > 0)
        if len(entrants):
            pieces = self._pieces(rows, entrants, lambda row: int(rows.first[row]))
            host["state_read"][: len(pieces)] = pieces
        return len(entrants)

    def _keeping(self, host: Host, rows: StepRows) -> int:
        """Which rows of the exit buffer are kept as states, and where."""
        last = self._geometry.num_segments
        keeps = np.array([part.keep_states and part.exit < last for part in rows.parts], np.bool_)
        if not keeps.any():
            return 0
        kept = np.flatnonzero(keeps[rows.part])
        pieces = self._pieces(rows, kept, lambda row: int(rows.exit[row]))
        host["state_write"][: len(pieces)] = pieces
        host["state_source"][: len(kept)] = rows.exit_number[kept]
        return len(kept)

    def _pieces(self, rows: StepRows, which: Longs, exit_of: Callable[[int], int]) -> Longs:
        """Pieces of the pool that hold the states of these rows, [rows x pieces of a state]."""
        size, per_page = self._geometry.block_tokens, self._geometry.page_pieces
        places = []
        for row in which.tolist():
            block, within = divmod(int(rows.position[row]), size)
            pages = np.asarray(rows.parts[rows.part[row]].state_pages[block, exit_of(row)], np.int64)
            numbers = within * self.state_pieces + np.arange(self.state_pieces)
            places.append(pages[numbers // per_page] * per_page + numbers % per_page)
        return np.concatenate(places)


def _tiles(host: Host, segment: int, run: Longs, tile_rows: int) -> int:
    """Cut runs of rows into tiles of up to `tile_rows`; how many there are."""
    firsts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])
    lengths = np.diff(np.r_[firsts, len(run)])
    per_run = -(-lengths // tile_rows)
    number = np.arange(per_run.sum()) - np.repeat(np.cumsum(per_run) - per_run, per_run)  # of a tile within its run
    count = len(number)
    host["tile_first"][segment, :count] = np.repeat(firsts, per_run) + number * tile_rows
    host["tile_rows"][segment, :count] = np.minimum(np.repeat(lengths, per_run) - number * tile_rows, tile_rows)
    return count


def _tokens(rows: StepRows, starting: Longs) -> list[int]:
    """Token ids of the rows that start from an embedding."""
    if len(rows.parts) == len(rows):  # a row each, the common case
        return [rows.parts[row].tokens[int(rows.position[row])] for row in starting.tolist()]
    found: list[int] = []
    for part in rows.parts:
        for span in part.spans:
            if span.first_segment == 0:
                found.extend(part.tokens[span.start : span.stop])
    return found


def _logits(host: Host, rows: StepRows) -> int:
    """Rows of the exit buffer that get logits: those of prompts whose log-probabilities are asked for, and sampled ones."""
    whole = np.array([part.prompt_logprobs is not None for part in rows.parts], np.bool_)
    sampled = np.array([part.stop - 1 if part.sample is not None else -1 for part in rows.parts])
    asked = rows.exit_number[whole[rows.part] | (rows.position == sampled[rows.part])]
    host["logit_rows"][: len(asked)] = asked
    return len(asked)
