"""A small replica and small workloads for the tests of the simulator."""

from dataclasses import replace
from typing import Any

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, View
from sortserve.engine.rungs import Ints, Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.simulator.memory import KVSizes
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import Workload
from tests.engine.small import small_ladder


def little_config(widths: tuple[int, ...] = (64,), **changes: Any) -> ReplicaConfig:
    """Six layers, exits 1, 3, 4 and 6, a step of at most 32 rows; 1 ms a layer at 1 row and twice that at 32."""
    ladder = small_ladder(widths, degraded=("d1", "d1-w50"))
    rungs = Rungs.of(ladder, SettingsTable(ladder))
    buckets = np.array([1.0, 32.0, 64.0])
    cost = CostTable(
        layers=rungs.layers,
        buckets=buckets,
        layer=np.array([0.5e-3, 1e-3, 2e-3]),
        ffn=np.array([0.5e-3, 1e-3, 2e-3]),
        head=np.array([1e-4, 2e-4, 4e-4]),
        base=1e-4,
        context_seconds=1e-7,
        pair_seconds=2e-8,
    )
    config = ReplicaConfig(rungs, cost, KVSizes(64, 64, 1e9), step_tokens=32, max_running=8)
    return replace(config, **changes)


def table(config: ReplicaConfig) -> CostTable:
    """The cost of a step, as a table."""
    assert isinstance(config.cost, CostTable)
    return config.cost


def little_workload(count: int, seed: int, *, rate: float = 20.0, factor: float = 1.0, strict: bool = True) -> Workload:
    """`count` requests with budgets of all kinds, some with none; `factor` widens the budgets."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, count)
    num_output = rng.integers(1, 12, count)
    num_prompt = rng.integers(1, 80, count)
    never = np.full(count, np.inf)
    return Workload(
        np.sort(rng.uniform(0, count / rate, count)),
        num_prompt,
        num_output,
        np.where(kind == 0, rng.uniform(0.05, 0.3, count) * factor, never),
        np.where(kind == 0, rng.uniform(0.01, 0.04, count) * factor, never),
        np.where(kind == 1, rng.uniform(0.1, 0.6, count) * factor, never),
        np.full(count, strict) & (kind < 2),
        np.full(count, -1, np.int64),
        np.zeros(count, np.int64),
    )


class RandomPolicy:
    """Anything that the protocol allows, from a seed: bad for requests, good at finding what breaks."""

    name = "random"

    def __init__(self, seed: int, refuses: float = 0.05) -> None:
        self._rng = np.random.default_rng(seed)
        self._refuses = refuses

    def decide(self, view: View) -> Decision:
        """Any place, now and then sitting out, now and then refusing."""
        count = len(view)
        place: Ints = self._rng.integers(view.floor, view.ceiling + 1)
        place = np.where(self._rng.random(count) < 0.2, SITS_OUT, place)
        refuse = view.strict & (view.place == NEVER_RAN) & (self._rng.random(count) < self._refuses)
        chunk = int(self._rng.integers(0, view.step_tokens + 1))
        return Decision(place, self._rng.integers(0, 9, count), refuse, chunk)
