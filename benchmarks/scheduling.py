"""Scheduling on the critical path: milliseconds of `schedule` and `update` at 256 running decode rows.

The runner's work is left out by canned results for all but a few steps, which give the time of a whole step beside it.
"""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.common import grid_engine, median, report
from sortserve.engine.budget import Budget
from sortserve.engine.engine import Engine
from sortserve.engine.plan import Plan, SequenceResult, StepResult
from sortserve.engine.protocol import GenerateRequest
from sortserve.engine.sampling import SamplingParams

ROWS = 256
STEPS = 200
KV_BYTES = 3 << 29
"""Of the 0.5B model 256 x (24 + 26 + 150 + 200) tokens are 1.2 GiB: with 1 GiB requests were preempted on the way."""
MOST_SECONDS = 1e-3
MOST_SHARE = 0.02


@dataclass
class Spent:
    """Seconds of each step."""

    critical: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)


def run(model: Path) -> None:
    """Print the figures for each policy."""
    figures: dict[str, object] = {}
    checks: dict[str, bool] = {}
    step_seconds: float | None = None
    for policy in ("fixed", "slack"):
        engine = grid_engine(model, policy=policy, max_running=ROWS, max_step_tokens=ROWS, kv_bytes=KV_BYTES)
        gc.collect()
        gc.freeze()  # as the engine's process does once it is loaded
        _fill(engine)
        if step_seconds is None:
            step_seconds = median(_real_step(engine) for _ in range(3))
            print(f"a step of {ROWS} rows takes {step_seconds * 1e3:.0f} ms")
        spent = _measure(engine)
        mean = float(np.mean(spent.critical))
        share = mean / step_seconds
        print(
            f"{policy}: mean {mean * 1e3:.2f} ms ({share:.2%} of a step), median {median(spent.critical) * 1e3:.2f}, "
            f"p99 {np.quantile(spent.critical, 0.99) * 1e3:.2f}; beside a running step {np.mean(spent.beside) * 1e3:.2f}"
        )
        figures[policy] = {
            "mean_ms": mean * 1e3,
            "beside_ms": float(np.mean(spent.beside)) * 1e3,
            "share_of_step": share,
        }
        checks[f"{policy}: at most {MOST_SECONDS * 1e3:.0f} ms on average"] = mean <= MOST_SECONDS
        checks[f"{policy}: at most {MOST_SHARE:.0%} of a step"] = share <= MOST_SHARE
    report("scheduling", figures | {"rows": ROWS, "step_ms": 1e3 * (step_seconds or 0.0)}, checks)


def _fill(engine: Engine) -> None:
    """256 requests with budgets nobody can miss, their prompts computed in steps with canned results."""
    draw = np.random.default_rng(0)
    for number in range(ROWS):
        prompt = tuple(draw.integers(0, engine.info.vocab_size, 24).tolist())
        sampling = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True)
        budget = Budget(total_ms=3_600_000.0)
        engine.scheduler.add(GenerateRequest(str(number), prompt, sampling, time.monotonic(), budget))
    while any(request.num_output == 0 for request in engine.scheduler.requests.values()):
        plan = engine.scheduler.schedule(time.monotonic())
        assert plan is not None
        engine.scheduler.update(plan, _canned(plan), time.monotonic())


def _canned(plan: Plan) -> StepResult:
    drawn = tuple(SequenceResult(None if part.sample is None else part.stop) for part in plan.sequences)
    return StepResult(drawn, 1.0)


def _real_step(engine: Engine) -> float:
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def _measure(engine: Engine) -> Spent:
    """What waits: planning a step, and booking its tokens. What the engine does beside a running step is done before, and
    timed by itself."""
    spent = Spent()
    scheduler = engine.scheduler
    for _ in range(STEPS):
        began = time.perf_counter()
        plan = scheduler.schedule(time.monotonic())
        planned = time.perf_counter()
        assert plan is not None
        assert len(plan.sequences) == ROWS
        scheduler.beside(plan, time.monotonic())
        aside = time.perf_counter()
        result = _canned(plan)
        before = time.perf_counter()
        scheduler.update(plan, result, time.monotonic())
        spent.critical.append(planned - began + time.perf_counter() - before)
        spent.beside.append(aside - planned)
    return spent
