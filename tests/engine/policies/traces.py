"""Small simulated traces: a synthetic machine on the test ladder, and random requests on it."""

from typing import Any

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.simulator.memory import KVSizes
from sortserve.engine.simulator.records import Records
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.traces import Workload
from tests.engine.policies.views import DEPTHS, machine

PLENTY = KVSizes(1, 1, 1e9)


def config(cost: CostTable | None = None, **fields: Any) -> ReplicaConfig:
    """One replica: compute-bound, 64 rows a step take 39.4 ms at full depth (6 layers), 7.4 ms at the floor (1)."""
    cost = cost or machine(DEPTHS, weights=4e-4, base=1e-3)
    return ReplicaConfig(DEPTHS, cost, PLENTY, step_tokens=64, max_running=32, **fields)


def workload(
    arrival: Any, num_prompt: Any, num_output: Any, *, total: Any = np.inf, ttft: Any = np.inf, strict: Any = False
) -> Workload:
    """Requests; scalars count for all. `total` and `ttft` in seconds."""
    count = len(arrival)

    def column(value: Any, kind: type) -> Any:
        return np.broadcast_to(np.asarray(value, kind), (count,)).copy()

    return Workload(
        np.asarray(arrival, np.float64),
        column(num_prompt, np.int64),
        column(num_output, np.int64),
        column(ttft, np.float64),
        column(np.inf, np.float64),
        column(total, np.float64),
        column(strict, np.bool_),
        column(-1, np.int64),
        column(0, np.int64),
    )


def random_workload(seed: int, *, strict: bool = False) -> Workload:
    """5 to 25 requests within a second or two: from half to four times of what the full model can do."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(5, 26))
    arrival = np.sort(rng.uniform(0, rng.uniform(0.1, 1), count))
    prompts = np.maximum(rng.lognormal(3.5, 0.8, count).astype(np.int64), 1)
    outputs = rng.integers(1, 20, count)
    total = np.where(rng.random(count) < 0.6, rng.uniform(0.15, 1.5, count), np.inf)
    ttft = np.where(np.isinf(total) & (rng.random(count) < 0.75), rng.uniform(0.1, 0.8, count), np.inf)
    return workload(arrival, prompts, outputs, total=total, ttft=ttft, strict=strict)


def run(name: str, work: Workload, replica: ReplicaConfig | None = None, **options: Any) -> Records:
    """What became of it."""
    replica = replica or config()
    return simulate(replica, lambda: make_policy(name, replica.rungs, **options), work).records
