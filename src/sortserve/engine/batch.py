"""From a plan to tensors: for every segment, which rows run, where their K/V live, and who enters and leaves.

The rows of a segment are the spans active in it, in the plan's order of sequences and by position. Without entrants
they are the first rows of the segment before; with entrants they are gathered once by an index list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import Plan, SequencePlan, Span
from sortserve.engine.submodel import LayerSettings
from sortserve.kernels.attention import AttentionRows, RowGroup, causal_mask
from sortserve.kernels.ffn import FfnRows, plan_rows
from sortserve.kernels.native_layers import RowSettings

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """A span inside one segment: its sequence's plan, and its rows [row, row + span.num_rows) there."""

    part: SequencePlan
    span: Span
    row: int


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """One segment of a step.

    `source` gathers the segment's input from [rows that stay; states of entrants], None where the input simply is the
    first `num_rows` rows of the segment before. `last` are the rows whose output is needed beyond the segment's last
    layer (the others only write K/V there), None for all.
    """

    segment: int
    num_rows: int
    positions: Tensor  # [num_rows]
    source: Tensor | None
    entrants: tuple[Run, ...]
    write_rows: Tensor | None  # rows that write K/V; None: all
    write_slots: tuple[Tensor, ...]  # per page of the cell: [2 x writers] K and V token slots of the page's layer 0
    attention: AttentionRows
    last: Tensor | None
    last_attention: AttentionRows
    settings: tuple[int, ...]  # distinct settings ids
    rows_settings: NDArray[np.int16]  # [num_rows] index into `settings`
    leaving: tuple[Run, ...]  # runs whose exit this segment is; rows counted among `last`
    num_staying: int  # rows that go on to the next segment: the first ones
    layout: tuple[bytes, bytes]  # `rows_settings` of all and of the `last` rows, as a key for what is derived from them

    @property
    def decodes(self) -> bool:
        """Whether every row is the next token of a sequence: nothing to leave unwritten, and no run of rows."""
        groups = self.attention.groups
        alone = len(groups) == 1 and groups[0].rows is None and groups[0].rows_each == 1
        return alone and self.write_rows is None and self.last is None

    def choose(self, by_settings: Sequence[bool], last: bool, dtype: torch.dtype) -> Tensor:
        """Per row 0 or 1 by its settings, [rows, 1]; of the `last` rows only if `last`."""
        rows = torch.tensor(by_settings)[torch.from_numpy(self.rows_settings).long()]
        if last and self.last is not None:
            rows = rows[self.last]
        return rows[:, None].to(dtype)


@dataclass(slots=True)
class BatchBuilder:
    """Builds the segments of a step. `bounds` etc. come from the geometry; masks are made in the model's dtype."""

    geometry: KVGeometry
    dtype: torch.dtype
    window: int | None = None
    ffn_cache: dict[tuple[object, ...], FfnRows] = field(default_factory=dict)
    layer_cache: dict[tuple[object, ...], RowSettings] = field(default_factory=dict)

    def build(self, plan: Plan) -> list[SegmentBatch]:
        """The segments that some row runs, ascending."""
        deepest = max(part.exit for part in plan.sequences)
        batches: list[SegmentBatch] = []
        before: list[Run] = []
        for segment in range(deepest):
            runs = self._runs(plan, segment)
            if not runs:  # only a refill, which enters further up
                continue
            batches.append(self._segment(segment, runs, before))
            before = runs
        return batches

    def _runs(self, plan: Plan, segment: int) -> list[Run]:
        runs, row = [], 0
        for part in plan.sequences:
            if part.exit <= segment:
                break
            for span in part.spans:
                if span.first_segment <= segment:
                    runs.append(Run(part, span, row))
                    row += span.num_rows
        return runs

    def _segment(self, segment: int, runs: list[Run], before: list[Run]) -> SegmentBatch:
        positions = np.concatenate([np.arange(run.span.start, run.span.stop) for run in runs])
        num_rows = len(positions)
        row_pages = np.concatenate([self._row_pages(run, segment) for run in runs])  # [num_rows, cell pages]
        writes = np.concatenate(
            [np.arange(run.span.start, run.span.stop) >= run.part.watermark[segment] for run in runs]
        )
        source, entrants = self._source(segment, runs, before)
        kept, leaving = self._kept_rows(segment, runs)
        all_kept = len(kept) == num_rows
        attention = self._attention([(run, run.span.start, run.span.stop, run.row) for run in runs], segment, num_rows)
        ids = [run.span.settings[segment] for run in runs]
        distinct = tuple(sorted(set(ids)))
        rows_settings = np.repeat(
            np.array([distinct.index(i) for i in ids], np.int16), [run.span.num_rows for run in runs]
        )
        return SegmentBatch(
            segment=segment,
            num_rows=num_rows,
            positions=torch.from_numpy(positions),
            source=source,
            entrants=entrants,
            write_rows=None if writes.all() else torch.from_numpy(np.flatnonzero(writes)),
            write_slots=self._write_slots(row_pages[writes], positions[writes]),
            attention=attention,
            last=None if all_kept else torch.from_numpy(np.asarray(kept, np.int64)),
            last_attention=attention if all_kept else self._kept_attention(segment, runs),
            settings=distinct,
            rows_settings=rows_settings,
            leaving=leaving,
            num_staying=sum(run.span.num_rows for run in runs if run.span.exit > segment + 1),
            layout=(rows_settings.tobytes(), rows_settings[kept].tobytes()),
        )

    def _row_pages(self, run: Run, segment: int) -> NDArray[np.int32]:
        size, columns = self.geometry.block_tokens, self.geometry.columns(segment)
        if run.span.num_rows == 1:
            return run.part.pages[run.span.start // size, columns][None]
        return run.part.pages[np.arange(run.span.start, run.span.stop) // size, columns]

    def _write_slots(self, pages: NDArray[np.int32], positions: Longs) -> tuple[Tensor, ...]:
        size, layers = self.geometry.block_tokens, self.geometry.page_layers
        slots = []
        for column in range(pages.shape[1]):
            key = pages[:, column].astype(np.int64) * (2 * layers * size) + positions % size
            slots.append(torch.from_numpy(np.stack([key, key + layers * size], axis=1).reshape(-1)))
        return tuple(slots)

    def _source(self, segment: int, runs: list[Run], before: list[Run]) -> tuple[Tensor | None, tuple[Run, ...]]:
        """Who enters at this segment's start, and where every row's input lies."""
        entrants = tuple(run for run in runs if run.span.first_segment == segment)
        if segment == 0 or not entrants:
            return None, entrants
        old_rows = {(run.part.request_id, run.span.start): run.row for run in before}
        num_staying = sum(run.span.num_rows for run in before if run.span.exit > segment)
        places, entered = [], 0
        for run in runs:
            if run.span.first_segment == segment:
                first = num_staying + entered
                entered += run.span.num_rows
            else:
                first = old_rows[run.part.request_id, run.span.start]
            places.append(np.arange(first, first + run.span.num_rows))
        return torch.from_numpy(np.concatenate(places)), entrants

    def _needed(self, run: Run, segment: int) -> tuple[int, int]:
        """Positions of a run whose output is needed after the segment's last layer."""
        span, part = run.span, run.part
        if span.exit > segment + 1 or part.keep_states or part.prompt_logprobs is not None:
            return span.start, span.stop
        wants = part.sample is not None and span.stop == part.stop
        return (span.stop - 1, span.stop) if wants else (span.stop, span.stop)

    def _kept_rows(self, segment: int, runs: list[Run]) -> tuple[list[int], tuple[Run, ...]]:
        """Rows kept after the last layer, and the leaving runs with their places among these."""
        kept: list[int] = []
        leaving = []
        for run in runs:
            start, stop = self._needed(run, segment)
            if run.span.exit == segment + 1 and stop > start:
                narrowed = Span(start, stop, run.span.first_segment, run.span.exit, run.span.settings)
                leaving.append(Run(run.part, narrowed, len(kept)))
            first = run.row + start - run.span.start
            kept.extend(range(first, first + stop - start))
        return kept, tuple(leaving)

    def _kept_attention(self, segment: int, runs: list[Run]) -> AttentionRows:
        wanted, row = [], 0
        for run in runs:
            start, stop = self._needed(run, segment)
            if stop > start:
                wanted.append((run, start, stop, row))
                row += stop - start
        return self._attention(wanted, segment, row)

    def _attention(self, wanted: Sequence[tuple[Run, int, int, int]], segment: int, num_rows: int) -> AttentionRows:
        """Group (run, start, stop, first row): single rows together, each longer run by itself."""
        single = [(run, start, row) for run, start, stop, row in wanted if stop - start == 1]
        groups = []
        if single:
            longest = self.geometry.num_blocks(max(start for _, start, _ in single) + 1)
            pages = np.zeros((len(single), longest, self.geometry.cell_pages(segment)), np.int64)
            for place, (run, start, _) in enumerate(single):
                count = self.geometry.num_blocks(start + 1)
                pages[place, :count] = run.part.pages[:count, self.geometry.columns(segment)]
            rows = None if len(single) == num_rows else torch.tensor([row for _, _, row in single])
            mask = partial(self._mask, [start for _, start, _ in single], 1, longest)
            groups.append(RowGroup(len(single), 1, rows, self._blocks(pages), mask))
        for run, start, stop, row in wanted:
            if stop - start > 1:
                count = self.geometry.num_blocks(stop)
                pages = run.part.pages[None, :count, self.geometry.columns(segment)].astype(np.int64)
                alone = stop - start == num_rows
                groups.append(
                    RowGroup(
                        1,
                        stop - start,
                        None if alone else slice(row, row + stop - start),
                        self._blocks(pages),
                        partial(self._mask, [start], stop - start, count),
                    )
                )
        return AttentionRows(num_rows, tuple(groups))

    def _mask(self, starts: list[int], rows_each: int, blocks: int) -> Tensor | None:
        context = blocks * self.geometry.block_tokens
        if rows_each == 1 and self.window is None and min(starts) == context - 1:
            return None
        return causal_mask(starts, rows_each, context, self.dtype, self.window)

    def _blocks(self, pages: Longs) -> tuple[Tensor, ...]:
        """pages [sequences, blocks, cell pages] -> pool rows of K and V, [2, sequences, blocks] per page of the cell."""
        layers = self.geometry.page_layers
        keys = torch.from_numpy(pages * (2 * layers))
        return tuple(torch.stack([keys[:, :, column], keys[:, :, column] + layers]) for column in range(keys.shape[2]))

    def ffn_rows(
        self, batch: SegmentBatch, widths: tuple[int, ...], boundaries: tuple[int, ...], last: bool
    ) -> FfnRows:
        """Lay out a layer's FFN for all rows, or the `last` ones; `widths` are those of `batch.settings`. Layers and steps
        that are alike share the answer."""
        key = (widths, boundaries, batch.layout[last])
        if key not in self.ffn_cache:
            if len(self.ffn_cache) > 256:
                self.ffn_cache.clear()
            settings = np.frombuffer(batch.layout[last], np.int16)
            self.ffn_cache[key] = plan_rows(np.asarray(widths)[settings].tolist(), boundaries, self.dtype)
        return self.ffn_cache[key]

    def layer_rows(
        self, batch: SegmentBatch, by_id: Sequence[LayerSettings], make: Callable[[Longs, Longs], RowSettings]
    ) -> RowSettings:
        """What `make` gives for widths and attention [layers, rows]; `by_id` are the settings of `batch.settings`. Steps
        that are alike share the answer."""
        key = (batch.segment, batch.settings, batch.layout[0])
        if key not in self.layer_cache:
            if len(self.layer_cache) > 256:
                self.layer_cache.clear()
            both = np.array(by_id, np.int64)[batch.rows_settings]  # [rows, layers, width and attention]
            self.layer_cache[key] = make(both[:, :, 0].T, both[:, :, 1].T)
        return self.layer_cache[key]
