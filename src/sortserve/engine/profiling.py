"""The short profile at start: synthetic steps of the shapes that tell the terms of a cost table apart.

Three places of the ladder (the full model, the shallowest, the narrowest) at row counts in powers of two; steps without
logits, for what the head costs; rows far into a context, for K/V reads; and chunks of a prompt. In turn, round after round
as long as the time suffices, and of each point the lower quartile: whatever else the machine does only adds.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.cost_fit import Measured, fit_table
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.kv import KVManager
from sortserve.engine.plan import Plan, SampleSpec, SequencePlan, Span, StepResult
from sortserve.engine.rungs import Rungs
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.settings import SettingsTable

PROFILE_SECONDS = 4.0
"""Time for rounds beyond the first."""
MOST_SECONDS = 12.0
"""Time for the first round, but for steps of few rows."""
MOST_ROUNDS = 9
MOST_BUCKET = 128
"""Beyond it computing decides, and times go in proportion."""
LONG_CONTEXT = 512


class Profiler:
    """Runs synthetic steps on the runner, in pages that it borrows."""

    def __init__(
        self,
        run: Callable[[Plan], StepResult],
        kv: KVManager,
        settings: SettingsTable,
        rungs: Rungs,
        *,
        max_running: int,
        max_step_tokens: int,
        max_model_len: int,
        confidence: bool = False,
    ) -> None:
        """`confidence`: the steps that are to be priced have their signals read, as `Plan.confidence` says."""
        self._run = run
        self.confidence = confidence
        self._kv = kv
        self._settings = settings
        self._rungs = rungs
        self._max_running = max_running
        self._max_context = max_model_len
        most = min(max_step_tokens, MOST_BUCKET)
        self.buckets = [1 << power for power in range(most.bit_length())]
        self._places = sorted({rungs.full, self._shallowest(), self._narrowest()})
        self._spec = SampleSpec(SamplingParams(temperature=0.0), 0, 1, (), ())

    def fit(self, seconds: float = PROFILE_SECONDS) -> CostTable:
        """Measure everything once, small steps first, then again as long as `seconds` suffice, and fit. On a machine that is
        too slow or too busy even for that, what is left out are the largest steps: times then go in proportion from
        the largest one measured."""
        plans = self.plans()
        taken: list[list[float]] = [[] for _ in plans]
        small_first = sorted(range(len(plans)), key=lambda number: plans[number].num_rows)
        # the first steps of a process find weights in no cache and kernels not made yet: up to 40 times slower (0.5B model)
        for rows in (1, 1, 8, 16):
            if rows in self.buckets:
                self._run(self._rows(self._rungs.full, rows))
        began = time.perf_counter()
        for number in range(MOST_ROUNDS + 1):
            for place in small_first:
                if number == 1 and place == small_first[0]:
                    began = time.perf_counter()
                spent = time.perf_counter() - began
                if number == 0:
                    worth_it = spent < MOST_SECONDS or plans[place].num_rows <= 8
                else:
                    worth_it = bool(taken[place]) and spent + taken[place][-1] < seconds
                if worth_it:
                    taken[place].append(self._run(plans[place]).seconds)
        # of few runs the fastest: the first one of a shape is slower than all others
        quartiles = np.array([np.quantile(times, 0.25, method="lower") if times else np.inf for times in taken])
        by_rows = quartiles[: len(self._places) * len(self.buckets)].reshape(len(self.buckets), -1)
        # fewer rows never take longer: what says so was measured while the machine was busy with something else
        by_rows[:] = np.minimum.accumulate(by_rows[::-1])[::-1]
        measured = [
            Measured(shape_of_parts(self._rungs, plan.sequences), seconds)
            for plan, seconds in zip(plans, quartiles.tolist(), strict=True)
            if seconds < np.inf
        ]
        buckets = [rows for rows, times in zip(self.buckets, by_rows, strict=True) if (times < np.inf).all()]
        return fit_table(self._rungs.layers, buckets, measured)

    def plans(self) -> list[Plan]:
        """One step for each point."""
        full, shallow = self._rungs.full, self._shallowest()
        places = self._places
        plans = [self._rows(place, rows) for rows in self.buckets for place in places]
        few = [rows for rows in self.buckets if rows in (1, 8, 64)]
        plans += [self._rows(shallow, rows, sampled=False) for rows in few]
        long = min(LONG_CONTEXT, self._max_context)
        plans += [self._rows(full, rows, context=long) for rows in few if rows > 1]
        for rows in (16, 64):
            if rows in self.buckets and rows <= long:
                plans += [
                    self._plan([self._part(full, start, start + rows, False)]) for start in {0, max(0, long - rows)}
                ]
        return plans

    def quick(self) -> Plan:
        """A step of one row of the full model."""
        return self._rows(self._rungs.full, 1)

    def quick_seconds(self) -> float:
        """Its time now, warm."""
        plan = self.quick()
        return float(np.quantile([self._run(plan).seconds for _ in range(4)][1:], 0.25))

    # ---- synthetic steps

    def _rows(self, place: int, rows: int, context: int = 1, *, sampled: bool = True) -> Plan:
        """So many rows with a token each; chunks of a prompt where so many requests never run together."""
        if rows <= self._max_running:
            return self._plan([self._part(place, context - 1, context, sampled, number) for number in range(rows)])
        each = min(rows, self._max_context)
        return self._plan([self._part(place, 0, each, sampled, number) for number in range(rows // each)])

    def _plan(self, parts: Sequence[SequencePlan]) -> Plan:
        return Plan(0, tuple(parts), self.confidence)

    def _part(self, place: int, start: int, stop: int, sampled: bool, number: int = 0) -> SequencePlan:
        geometry, exit = self._kv.geometry, self._settings.exits[place]
        blocks = geometry.num_blocks(stop)
        # pages of its own for each sequence as far as there are any, all of them free: nothing runs yet
        columns = geometry.num_columns
        pages = (np.arange(blocks * columns) + number * blocks * columns) % self._kv.pool.num_pages
        return SequencePlan(
            request_id=str(number),
            submodel=place,
            exit=exit,
            spans=(Span(start, stop, 0, exit, self._settings.targets[place]),),
            tokens=(1,) * stop,
            watermark=(start,) * exit,
            pages=pages.astype(np.int32).reshape(blocks, columns),
            state_pages={},
            keep_states=False,
            sample=self._spec if sampled else None,
        )

    def _shallowest(self) -> int:
        widths = self._rungs.share.sum(1)
        return min(range(len(widths)), key=lambda place: (self._rungs.depth(place), -widths[place]))

    def _narrowest(self) -> int:
        per_layer = [
            self._rungs.share[place].sum() / self._rungs.depth(place) for place in range(len(self._rungs.exits))
        ]
        return min(range(len(per_layer)), key=lambda place: (per_layer[place], -self._rungs.depth(place)))
