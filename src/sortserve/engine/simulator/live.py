"""The requests alive in one replica, as a struct of arrays: one row each, in no order that matters."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sortserve.engine.policies.protocol import NEVER_RAN
from sortserve.engine.rungs import Bools, Floats, Ints
from sortserve.engine.simulator.traces import Workload

# name -> (type, value of a new request)
_COLUMNS: Mapping[str, tuple[type, float]] = {
    "id": (np.int64, 0),  # place in the workload
    "arrival": (np.float64, 0),
    "floor": (np.int64, 0),
    "ceiling": (np.int64, 0),
    "num_prompt": (np.int64, 0),
    "num_output": (np.int64, 0),
    "target": (np.int64, 0),  # output tokens it will have
    "expected": (np.int64, 0),  # output tokens it is thought to have
    "ttft_due": (np.float64, np.inf),
    "tpot": (np.float64, np.inf),
    "total_due": (np.float64, np.inf),
    "budgeted": (np.bool_, 0),
    "strict": (np.bool_, 0),
    "exact": (np.bool_, 0),
    "resumable": (np.bool_, 1),  # exit states of what is shallow are kept
    "running": (np.bool_, 0),
    "place": (np.int64, NEVER_RAN),
    "switched_at": (np.int64, 0),  # output tokens at the last switch
    "switches": (np.int64, 0),
    "refilled": (np.int64, 0),
    "preempted": (np.int64, 0),
    "first_token": (np.float64, -np.inf),  # when it came; -inf: not yet
    "last_token": (np.float64, -np.inf),
    "confidence": (np.float64, np.nan),
    "group": (np.int64, -1),
    "shared": (np.int64, 0),  # tokens of its system prompt
    "adopted": (np.int64, 0),  # tokens taken from the prefix cache: their pages are not its own
    "uniform": (np.bool_, 1),  # one place computed all of it
}

_KINDS: tuple[type, ...] = (np.int64, np.float64, np.bool_)
_WIDE = ("computed", "cached", "made")


class Live:
    """Columns of `_COLUMNS` and `_WIDE`, each an attribute with exactly one row per request. Write into them in place; they
    are other arrays after `add` and `keep`."""

    id: Ints
    arrival: Floats
    floor: Ints
    ceiling: Ints
    num_prompt: Ints
    num_output: Ints
    target: Ints
    expected: Ints
    ttft_due: Floats
    tpot: Floats
    total_due: Floats
    budgeted: Bools
    strict: Bools
    exact: Bools
    resumable: Bools
    running: Bools
    place: Ints
    switched_at: Ints
    switches: Ints
    refilled: Ints
    preempted: Ints
    first_token: Floats
    last_token: Floats
    confidence: Floats
    group: Ints
    shared: Ints
    adopted: Ints
    uniform: Bools
    computed: Ints  # [n, segments]
    cached: Ints  # [n, places]
    made: Ints  # [n, places] output tokens by place

    def __init__(self, num_segments: int, num_places: int) -> None:
        # one matrix [columns, capacity] per type, so that adding and dropping rows takes a few calls, not one per column
        self._names = {kind: [name for name, (of, _) in _COLUMNS.items() if of is kind] for kind in _KINDS}
        self._flat: dict[type, NDArray[Any]] = {
            kind: np.zeros((len(names), 64), kind) for kind, names in self._names.items()
        }
        self._new: dict[type, NDArray[Any]] = {
            kind: np.array([_COLUMNS[name][1] for name in names], kind) for kind, names in self._names.items()
        }
        # [segments, capacity] and so on: transposed, since steps compute along requests
        self._wide = {
            name: np.zeros((num_segments if name == "computed" else num_places, 64), np.int64) for name in _WIDE
        }
        self._count = 0
        self._expose()

    def __len__(self) -> int:
        return self._count

    @property
    def known(self) -> Ints:
        """[n] tokens known."""
        known: Ints = self.num_prompt + self.num_output
        return known

    def add(
        self, number: int, workload: Workload, *, floor: int, ceiling: int, expected: int, resumable: bool = True
    ) -> None:
        """Request `number` of the workload arrives. `resumable`: states are kept to deepen it from."""
        arrival, budgeted = workload.arrival[number], workload.budgeted[number]
        values = {
            "id": number,
            "arrival": arrival,
            "floor": floor,
            "ceiling": ceiling,
            "num_prompt": workload.num_prompt[number],
            "target": workload.num_output[number],
            "expected": expected,
            "ttft_due": arrival + workload.ttft[number],
            "tpot": workload.tpot[number],
            "total_due": arrival + workload.total[number],
            "budgeted": budgeted,
            "strict": workload.strict[number],
            "exact": not budgeted or floor == ceiling,
            "resumable": resumable,
            "group": workload.group[number],
            "shared": workload.shared[number],
        }
        at = self._count
        if at == self._flat[np.int64].shape[1]:
            self._flat = {kind: np.concatenate([rows, rows], axis=1) for kind, rows in self._flat.items()}
            self._wide = {name: np.concatenate([rows, rows], axis=1) for name, rows in self._wide.items()}
        for kind, rows in self._flat.items():
            rows[:, at] = self._new[kind]
        for rows in self._wide.values():
            rows[:, at] = 0
        self._count += 1
        self._expose()
        for name, value in values.items():
            getattr(self, name)[at] = value

    def keep(self, mask: Bools) -> None:
        """Only those of the mask stay."""
        stay = np.flatnonzero(mask)
        first = int(np.argmin(mask)) if len(stay) < self._count else self._count  # to go; all before it stay in place
        for rows in (*self._flat.values(), *self._wide.values()):
            rows[:, first : len(stay)] = rows[:, stay[first:]]
        self._count = len(stay)
        self._expose()

    def _expose(self) -> None:
        """Make the attributes show the rows there are."""
        count = self._count
        for kind, names in self._names.items():
            for name, row in zip(names, self._flat[kind], strict=True):
                setattr(self, name, row[:count])
        for name, rows in self._wide.items():
            setattr(self, name, rows[:, :count].T)

    # ---- what follows from the columns

    def expected_left(self) -> Ints:
        """[n] output tokens still expected, at least 1. One that is longer than expected goes on a little, again and
        again."""
        left: Ints = np.maximum(self.expected - self.num_output, 1)
        return left

    def dues(self) -> tuple[Floats, Floats]:
        """[n] when the last expected token is due, and the nearest deadline; as `Budget.due` has it."""
        started = np.where(np.isfinite(self.ttft_due), np.maximum(self.ttft_due, self.first_token), self.first_token)
        ticking = np.isfinite(started) & np.isfinite(self.tpot)
        last = np.maximum(self.expected, self.num_output + 1)
        began = np.where(ticking, started, 0.0)
        pace = np.where(ticking, self.tpot, 0.0)
        of_last = np.where(ticking, began + (last - 1) * pace, np.inf)
        of_next = np.where(ticking, began + self.num_output * pace, np.inf)
        last_due = np.minimum(np.where(last == 1, self.ttft_due, of_last), self.total_due)
        next_due = np.minimum(np.where(self.num_output == 0, self.ttft_due, of_next), last_due)
        return last_due, next_due
