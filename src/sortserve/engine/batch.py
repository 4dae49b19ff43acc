"""From a plan to tensors: for every segment, which rows run, where their K/V live, and who enters and leaves.

The rows of a segment are the spans active in it, in the plan's order of sequences and by position. Without entrants
they are the first rows of the segment before; with entrants they are gathered once by an index list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import Plan, SequencePlan, Span
from sortserve.engine.submodel import LayerSettings
from sortserve.kernels.attention import AttentionRows
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
    source: Tensor | None
    entrants: tuple[Run, ...]
    attention: AttentionRows
    last: Tensor | None
    settings: tuple[int, ...]  # distinct settings ids
    rows_settings: NDArray[np.int16]  # [num_rows] index into `settings`
    leaving: tuple[Run, ...]  # runs whose exit this segment is; rows counted among `last`
    num_staying: int  # rows that go on to the next segment: the first ones
    layout: tuple[bytes, bytes]  # `rows_settings` of all and of the `last` rows, as a key for what is derived from them

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
        source, entrants = self._source(segment, runs, before)
        kept, leaving = self._kept_rows(segment, runs)
        ids = [run.span.settings[segment] for run in runs]
        distinct = tuple(sorted(set(ids)))
        rows_settings = np.repeat(
            np.array([distinct.index(i) for i in ids], np.int16), [run.span.num_rows for run in runs]
        )
        return SegmentBatch(
            segment=segment,
            num_rows=num_rows,
            source=source,
            entrants=entrants,
            attention=self._attention(segment, runs, positions),
            last=None if len(kept) == num_rows else torch.from_numpy(np.asarray(kept, np.int64)),
            settings=distinct,
            rows_settings=rows_settings,
            leaving=leaving,
            num_staying=sum(run.span.num_rows for run in runs if run.span.exit > segment + 1),
            layout=(rows_settings.tobytes(), rows_settings[kept].tobytes()),
        )

    def _attention(self, segment: int, runs: list[Run], positions: Longs) -> AttentionRows:
        """Where the rows' sequences have their K/V, and which rows find their own there already."""
        geometry, owners, numbers = self.geometry, list[Run](), list[int]()
        for run in runs:  # the last run of each sequence reaches furthest
            if owners and owners[-1].part is run.part:
                owners[-1] = run
            else:
                owners.append(run)
            numbers.append(len(owners) - 1)
        counts = [geometry.num_blocks(run.span.stop) for run in owners]
        pages = np.zeros((geometry.cell_pages(segment), len(owners), max(counts)), np.int64)
        for number, (run, count) in enumerate(zip(owners, counts, strict=True)):
            pages[:, number, :count] = run.part.pages[:count, geometry.columns(segment)].T
        rows_each = [run.span.num_rows for run in runs]
        writes = positions >= np.repeat([run.part.watermark[segment] for run in runs], rows_each)
        return AttentionRows(
            positions=torch.from_numpy(positions),
            sequences=torch.from_numpy(np.repeat(numbers, rows_each)),
            writes=None if writes.all() else torch.from_numpy(writes),
            tables=torch.from_numpy(pages * (2 * geometry.page_layers)).unbind(),
            block_tokens=geometry.block_tokens,
            page_layers=geometry.page_layers,
            window=self.window,
            dtype=self.dtype,
        )

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
        """What `make` gives for widths and attention [layers, rows]; `by_id` are the settings of `batch.settings`. In the
        last layer rows that do not go on have neither. Steps that are alike share the answer."""
        last = None if batch.last is None else batch.last.numpy()
        key = (batch.segment, batch.settings, batch.layout[0], None if last is None else last.tobytes())
        if key not in self.layer_cache:
            if len(self.layer_cache) > 256:
                self.layer_cache.clear()
            both = np.array(by_id, np.int64)[batch.rows_settings]  # [rows, layers, width and attention]
            if last is not None:
                both[np.isin(np.arange(batch.num_rows), last, invert=True), -1] = 0
            self.layer_cache[key] = make(both[:, :, 0].T, both[:, :, 1].T)
        return self.layer_cache[key]
