"""What became of every request, and of the steps: filled while simulating, read by the report."""

from collections import Counter

import numpy as np

from sortserve.engine.cost import StepKind
from sortserve.engine.policies.protocol import Reason
from sortserve.engine.rungs import Bools, Floats, Ints
from sortserve.engine.simulator.live import Live
from sortserve.engine.simulator.traces import Workload

WAITS, FINISHED, REFUSED, QUEUE_FULL = range(4)


class Records:
    """One row per request of the workload. Times in virtual seconds, -inf where it did not happen."""

    def __init__(self, workload: Workload, num_places: int) -> None:
        count = len(workload)
        self.workload = workload
        self.outcome: Ints = np.full(count, WAITS, np.int64)
        self.first_token: Floats = np.full(count, -np.inf)
        self.last_token: Floats = np.full(count, -np.inf)
        self.predicted: Floats = np.full(count, np.nan)  # seconds from arrival to the last token, told as it began
        self.predicted_p90: Floats = np.full(count, np.nan)
        self.met: Bools = np.zeros(count, np.bool_)
        self.quality: Floats = np.zeros(count)  # averaged over output tokens; 0 if there are none
        self.made: Ints = np.zeros((count, num_places), np.int64)
        self.switches: Ints = np.zeros(count, np.int64)
        self.refilled: Ints = np.zeros(count, np.int64)
        self.preempted: Ints = np.zeros(count, np.int64)
        self.switched: Counter[str] = Counter()  # by reason and direction
        self.steps: Counter[StepKind] = Counter()
        self.memory_short = 0
        self.row_steps = 0
        self.busy_until = 0.0
        self.peak_kv_bytes = 0.0

    def refuse(self, number: int, *, queue_full: bool) -> None:
        """Request `number` ends without having run."""
        assert self.outcome[number] == WAITS, "a request ends once"
        self.outcome[number] = QUEUE_FULL if queue_full else REFUSED

    def finish(self, live: Live, rows: Ints, quality: Floats) -> None:
        """These rows have their last token."""
        number = live.id[rows]
        assert (self.outcome[number] == WAITS).all(), "a request ends once"
        self.outcome[number] = FINISHED
        self.first_token[number] = live.first_token[rows]
        self.last_token[number] = live.last_token[rows]
        self.made[number] = live.made[rows]
        self.quality[number] = live.made[rows] @ quality / live.made[rows].sum(axis=1)
        self.switches[number] = live.switches[rows]
        self.refilled[number] = live.refilled[rows]
        self.preempted[number] = live.preempted[rows]
        self.met[number] = met(self.workload, number, self.first_token[number], self.last_token[number])

    def step(self, kind: StepKind, ends: Floats, num_rows: int, kv_bytes: float) -> None:
        """`len(ends)` steps of one kind were done."""
        self.steps[kind] += len(ends)
        self.row_steps += num_rows * len(ends)
        self.busy_until = max(self.busy_until, float(ends[-1]))
        self.peak_kv_bytes = max(self.peak_kv_bytes, kv_bytes)

    def switch(self, reasons: Ints, up: Bools) -> None:
        """So many changes of sub-model."""
        for reason, rises in zip(reasons.tolist(), up.tolist(), strict=True):
            self.switched[f"{Reason(reason).name.lower()}-{'up' if rises else 'down'}"] += 1


def met(workload: Workload, number: Ints, first: Floats, last: Floats) -> Bools:
    """[k] whether requests `number` with these first and last tokens kept their budgets, as `Budget.met` has it."""
    arrival = workload.arrival[number]
    ttft_due = arrival + workload.ttft[number]
    started = np.where(np.isfinite(ttft_due), np.maximum(ttft_due, first), first)
    gaps = workload.num_output[number] - 1
    with np.errstate(invalid="ignore"):
        last_due = np.where(gaps > 0, started + gaps * workload.tpot[number], np.inf)
    ok: Bools = (first <= ttft_due) & (last <= last_due) & (last <= arrival + workload.total[number])
    return ok & workload.budgeted[number]
