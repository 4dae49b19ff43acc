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
Which = slice | Longs  # of the rows
NO_CHANGE: Which = slice(None)  # as an index: where there is one row for each, which is what most steps have


@dataclass(frozen=True)
class StepRows:
    """All rows of a step, [rows] each unless said otherwise."""

    parts: tuple[SequencePlan, ...]
    part: Longs  # its sequence's place in the plan
    run: Longs  # number of its span: rows of one span are consecutive, and so are their positions
    position: Longs
    first: Longs  # the segment it enters at
    exit: Longs
    kind: Longs  # its settings, a column of `kinds`
    kinds: Longs  # [segments, kinds] ids of the layer settings; 0 where such a row does not run
    watermark: Longs | None  # [segments, sequences]; None: no row finds its K/V there already
    asked: Bools  # its logits are
    keeps: Bools  # its state is kept

    @classmethod
    def of(cls, plan: Plan, geometry: KVGeometry) -> "StepRows":
        """The rows of a plan. Per sequence only what differs by it is looked at in Python."""
        segments, parts = geometry.num_segments, plan.sequences
        spans = [span for part in parts for span in part.spans]
        starts = np.array([span.start for span in spans])
        counts = np.array([span.stop for span in spans]) - starts
        run, position, by_span = np.arange(len(spans)), starts, NO_CHANGE
        if counts.max() > 1:
            by_span = run = np.repeat(run, counts)
            position = np.arange(len(run)) - (np.cumsum(counts) - counts)[run] + starts[run]
        part, by_part, last = run, NO_CHANGE, np.ones(len(run), np.bool_)
        if len(run) > len(parts):
            by_part = part = np.repeat(np.arange(len(parts)), [len(part.spans) for part in parts])[by_span]
            last = np.append(part[1:] != part[:-1], True)
        of_kind: dict[tuple[int, ...], int] = {}
        kind = np.array([of_kind.setdefault(span.settings, len(of_kind)) for span in spans])
        padded = [settings + (0,) * (segments - len(settings)) for settings in of_kind]
        marks = None  # they never rise with depth, and a sequence's first row is its lowest
        if any(part.watermark[0] > part.spans[0].start for part in parts):
            marks = np.array([part.watermark + (0,) * (segments - part.exit) for part in parts], np.int64).T
        whole = np.array([part.prompt_logprobs is not None for part in parts])
        sampled = np.array([part.sample is not None for part in parts])
        keeps = np.array([part.keep_states and part.exit < segments for part in parts])
        return cls(
            parts=parts,
            part=part,
            run=run,
            position=position,
            first=np.array([span.first_segment for span in spans])[by_span],
            exit=np.array([span.exit for span in spans])[by_span],
            kind=kind[by_span],
            kinds=np.array(padded, np.int64).T,
            watermark=marks,
            asked=whole[by_part] | (sampled[by_part] & last),
            keeps=keeps[by_part],
        )

    def __len__(self) -> int:
        return len(self.part)

    @cached_property
    def wanted(self) -> Bools:
        """Its output is needed beyond its last layer; of the others only K/V are."""
        return self.asked | self.keeps

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
        # per segment [layers, settings]
        self._widths = [np.array([[width for width, _ in one] for one in known], np.int32).T for known in by_segment]
        self._attends = [np.array([[on for _, on in one] for one in known], np.bool_).T for known in by_segment]
        self.state_pieces = geometry.hidden_size // geometry.state_piece

    def fill(self, host: Host, capacity: int, rows: StepRows, tables: PageTables, tile_rows: int) -> StepCounts:
        """Write everything about `rows` into `host`, which holds padding. Attention tiles have up to `tile_rows` rows."""
        size, g = self._geometry.block_tokens, self._geometry.page_layers
        seats = tables.seat(rows.parts)[rows.part]
        block, within = rows.position // size, rows.position % size
        slots = tables.mirror[:, seats, block] * np.int64(2 * g * size) + within  # [columns, rows]
        place = np.zeros(len(rows), np.int64)
        segments, tiles = [], []
        for segment in range(int(rows.exit.max())):
            active, count = _active(rows, segment)
            segments.append(count)
            tiles.append(count)
            if not count:  # only a refill, which enters further up
                continue
            host["sequence"][segment, :count] = seats[active]
            self._rows(host, capacity, rows, segment, active, count, place)
            self._slots(host, rows, segment, active, count, slots)
            if tile_rows > 1:
                # a tile is skipped by its first row, so rows that stop short of the last layer's output have their own
                stops_short = (rows.exit[active] == segment + 1) & ~rows.wanted[active]
                tiles[-1] = _tiles(host, segment, 2 * rows.run[active] + stops_short, tile_rows)
        starting = np.flatnonzero(rows.first == 0)
        host["tokens"][: len(starting)] = _tokens(rows, starting)
        return StepCounts(
            tuple(segments), tuple(tiles), _logits(host, rows), self._entering(host, rows), self._keeping(host, rows)
        )

    def _rows(
        self, host: Host, capacity: int, rows: StepRows, segment: int, active: Which, count: int, place: Longs
    ) -> None:
        """Where the segment's rows come from and leave to, and what its layers do with them. `place`: of each row in the
        segment before; brought up to date."""
        position, first = rows.position[active], rows.first[active]
        if segment:
            entering = capacity + rows.entry_number[active]
            host["source"][segment, :count] = np.where(first == segment, entering, place[active])
        place[active] = np.arange(count)
        host["position"][segment, :count] = position

        start, end = self._geometry.bounds[segment], self._geometry.bounds[segment + 1]
        ids = rows.kinds[segment][rows.kind[active]]
        host["width"][start:end, :count] = self._widths[segment][:, ids]
        attends = self._attends[segment]
        host["attend"][start:end, :count] = position if attends.all() else np.where(attends[:, ids], position, -1)

        leaving, wanted = rows.exit[active] == segment + 1, rows.wanted[active]
        if leaving.any():
            gone, unwanted = leaving & wanted, leaving & ~wanted
            host["exit_slot"][segment, :count][gone] = rows.exit_number[active][gone]
            # whose output nobody needs only writes K/V in its last layer
            host["width"][end - 1, :count][unwanted] = 0
            host["attend"][end - 1, :count][unwanted] = -1

    def _slots(self, host: Host, rows: StepRows, segment: int, active: Which, count: int, slots: Longs) -> None:
        """Where K/V are written, by column of pages."""
        columns = self._geometry.columns(segment)
        mine = slots[columns][:, active]
        if rows.watermark is not None:
            mine = np.where(rows.position[active] >= rows.watermark[segment, rows.part[active]], mine, -1)
        host["slots"][columns, :count] = mine

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
        kept = np.flatnonzero(rows.keeps)
        if not len(kept):
            return 0
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


def _active(rows: StepRows, segment: int) -> tuple[Which, int]:
    """The rows that run in a segment, and how many. Without entrants they are the first ones, and taken without a copy."""
    runs = (rows.first <= segment) & (rows.exit > segment)
    count = int(np.count_nonzero(runs))
    return (slice(0, count) if runs[:count].all() else np.flatnonzero(runs)), count


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
        tokens = [part.tokens[at] for part, at in zip(rows.parts, rows.position.tolist(), strict=True)]
        return tokens if len(starting) == len(tokens) else [tokens[row] for row in starting.tolist()]
    found: list[int] = []
    for part in rows.parts:
        for span in part.spans:
            if span.first_segment == 0:
                found.extend(part.tokens[span.start : span.stop])
    return found


def _logits(host: Host, rows: StepRows) -> int:
    """Rows of the exit buffer that get logits: those of prompts whose log-probabilities are asked for, and sampled ones."""
    asked = rows.exit_number[rows.asked]
    host["logit_rows"][: len(asked)] = asked
    return len(asked)
