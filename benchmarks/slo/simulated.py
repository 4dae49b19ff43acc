"""What the simulator says of a point: the same requests, with the step times that the point's own server has measured or
learned when it started."""

from dataclasses import replace
from typing import Any

from benchmarks.slo.serving import Settings
from sortserve.engine.config import EngineConfig
from sortserve.engine.ladder import Ladder
from sortserve.engine.profile_cache import cache_folder
from sortserve.engine.simulator.command import maker
from sortserve.engine.simulator.hardware import measured_config
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.summary import summarize
from sortserve.engine.simulator.traces import Workload
from sortserve.server.cli import size


def foretold(
    settings: Settings, policy: str, ladder: Ladder, pinned: str, work: Workload, seconds: float, kv_memory: str
) -> dict[str, Any]:
    """Shares of the requests with a budget, and goodput a second over `seconds`. `pinned`: id for the policy `fixed`, or "".
    Raises RuntimeError if the server has kept no step times."""
    files = sorted(cache_folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise RuntimeError(f"no step times in {cache_folder()}: --simulated needs a server that keeps them")
    usual = EngineConfig(settings.model)
    backend = _flag(settings.flags, "--backend", "native")
    config = measured_config(settings.model, files[-1], size(kv_memory), backend=backend, ladder=ladder)
    rows = int(_flag(settings.flags, "--max-batch-tokens", str(usual.max_step_tokens)))
    config = replace(config, step_tokens=rows, max_running=usual.max_running, max_waiting=usual.max_waiting)
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
