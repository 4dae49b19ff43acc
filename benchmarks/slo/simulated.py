"""What the simulator says of a point: the same requests, with the step times that the point's own server has measured or
learned when it started, slowed down to what its closed loops did. A profile knows nothing of what is done between steps,
nor of a client and an HTTP process on the same cores."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.slo.serving import Settings
from sortserve.engine.config import EngineConfig
from sortserve.engine.cost import CostTable
from sortserve.engine.ladder import Ladder
from sortserve.engine.profile_cache import cache_folder
from sortserve.engine.simulator.capacity import closed_loop_rate
from sortserve.engine.simulator.command import maker
from sortserve.engine.simulator.hardware import measured_config
from sortserve.engine.simulator.replica import ReplicaConfig
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.summary import summarize
from sortserve.engine.simulator.traces import Trace, Workload
from sortserve.server.flags import size

_ROUNDS = 4  # to find two numbers that hardly depend on each other
_REQUESTS = 400  # of a simulated closed loop
_PROBE_SECONDS = 1e-3


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


def slowness(config: ReplicaConfig, trace: Trace, clients: int, rates: dict[int, float]) -> Slowness:
    """Under which simulated closed loops of so many clients do `rates` requests a second, by place: the full model's and
    the floor's, since what is between steps weighs most where steps are short."""
    config = replace(config, max_running=clients)
    full, floor = config.rungs.full, min(rates)
    found = Slowness(1.0, 0.0)

    def seconds(slow: Slowness, place: int) -> float:
        return 1.0 / closed_loop_rate(slow.applied(config), trace, place, _REQUESTS)

    for _ in range(_ROUNDS):
        found = replace(found, factor=found.factor / seconds(found, full) / rates[full])
        now = seconds(found, floor)
        more = seconds(replace(found, between=found.between + _PROBE_SECONDS), floor) - now
        between = found.between + (1.0 / rates[floor] - now) / more * _PROBE_SECONDS
        found = replace(found, between=max(0.0, between))
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
    """Shares of the requests with a budget, and goodput a second. `pinned`: id for the policy `fixed`, or ""."""
    name = f"{policy}:{ladder.place(pinned)}" if pinned else policy
    summary = summarize(simulate(config, maker(name, config.rungs), work, 1), config, seconds)
    return {
        "attainment": summary.attainment,
        "refused_share": summary.refused,
        "late_share": summary.late,
        "goodput_per_second": summary.goodput,
        "mean_quality": summary.mean_quality,
        "busy_seconds": summary.busy_seconds,
    }


def _flag(flags: tuple[str, ...], name: str, otherwise: str) -> str:
    """The value of a flag of the server's, given apart from it."""
    return flags[flags.index(name) + 1] if name in flags else otherwise
