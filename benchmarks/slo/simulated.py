"""What the simulator says of a point: the same requests, with the step times that the first server has measured or learned
when it started, slowed down to what its closed loops did. A profile knows nothing of what is done between steps, nor of a
client and an HTTP process on the same cores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.slo.capacity import Capacity
from benchmarks.slo.serving import Settings
from sortserve.engine.config import EngineConfig
from sortserve.engine.cost import CostTable
from sortserve.engine.cost_fit import non_negative
from sortserve.engine.ladder import Ladder
from sortserve.engine.profile_cache import cache_folder
from sortserve.engine.simulator.capacity import closed_loop_seconds
from sortserve.engine.simulator.command import maker
from sortserve.engine.simulator.hardware import measured_config
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.summary import summarize
from sortserve.engine.simulator.traces import Trace, Workload
from sortserve.server.flags import size

_ROUNDS = 4  # who meets whom in a step depends a little on both numbers
_PROBE_SECONDS = 1e-3
_RUNS = 5
_NOISE = 0.05  # standard deviation of step times, relative: what equal steps in a row differ by on a quiet machine


@dataclass(frozen=True)
class Slowness:
    """Of the real server against its profile: every step `factor` times as long, and `between` seconds more."""

    factor: float
    between: float

    def applied(self, config: ReplicaConfig) -> ReplicaConfig:
        """The replica, as slow as that."""
        assert isinstance(config.cost, CostTable)
        table = config.cost.scaled(self.factor)
        return replace(config, cost=replace(table, base=table.base + self.between))


def slowness(
    config: ReplicaConfig, trace: Trace, ladder: Ladder, clients: int, measured: Sequence[Capacity]
) -> Slowness:
    """With which the simulated closed loops take as long as the measured ones, by least squares: the same requests in the
    same order, since a loop of seconds gets through so few that their mean length is a matter of chance. What is between
    steps weighs most where steps are short: it takes a deep sub-model and a shallow one to tell it."""
    found = Slowness(1.0, 0.0)
    for _ in range(_ROUNDS):
        design = []
        for loop in measured:

            def seconds(slow: Slowness, loop: Capacity = loop) -> float:
                replica = slow.applied(config)
                return closed_loop_seconds(replica, trace, ladder.place(loop.submodel), clients, loop.answers)

            taken = seconds(found)
            each = (seconds(replace(found, between=found.between + _PROBE_SECONDS)) - taken) / _PROBE_SECONDS
            work = (taken - each * found.between) / found.factor
            design.append([work / loop.seconds, each / loop.seconds])
        factor, between = non_negative(np.array(design), np.ones(len(design))).tolist()
        found = Slowness(factor, between)
    return found


def replica(settings: Settings, kv_memory: str, ladder: Ladder) -> ReplicaConfig:
    """By the step times that the last server has kept. Raises RuntimeError if there are none."""
    files = sorted(cache_folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise RuntimeError(f"no step times in {cache_folder()}: --simulated needs a server that keeps them")
    usual = EngineConfig(settings.model)
    backend = _flag(settings.flags, "--backend", "native")
    config = measured_config(settings.model, files[-1], size(kv_memory), backend=backend, ladder=ladder)
    rows = int(_flag(settings.flags, "--max-batch-tokens", str(usual.max_step_tokens)))
    return replace(config, step_tokens=rows, max_running=usual.max_running, max_waiting=usual.max_waiting)


def foretold(
    config: ReplicaConfig, policy: str, ladder: Ladder, pinned: str, work: Workload, seconds: float
) -> dict[str, Any]:
    """Shares of the requests with a budget, and goodput a second: means of several runs with steps that vary a little, since
    under overload a few milliseconds decide who is given up. `pinned`: id for the policy `fixed`, or ""."""
    make = maker(f"{policy}:{ladder.place(pinned)}" if pinned else policy, config.rungs)
    assert isinstance(config.cost, CostTable)
    told = replace(config, believed=config.cost, noise=_NOISE)  # what steps take is learned from them, as in the server
    runs = [
        summarize(simulate(each, make, work, 1), each, seconds)
        for each in (replace(told, noise_seed=seed) for seed in range(_RUNS))
    ]

    def mean(name: str) -> float:
        return float(np.mean([getattr(run, name) for run in runs]))

    kept = [run.attainment for run in runs]
    return {
        "attainment": mean("attainment"),
        "attainment_range": [min(kept), max(kept)],
        "refused_share": mean("refused"),
        "late_share": mean("late"),
        "goodput_per_second": mean("goodput"),
        "mean_quality": mean("mean_quality"),
        "busy_seconds": mean("busy_seconds"),
    }


def _flag(flags: tuple[str, ...], name: str, otherwise: str) -> str:
    """The value of a flag of the server's, given apart from it."""
    return flags[flags.index(name) + 1] if name in flags else otherwise
