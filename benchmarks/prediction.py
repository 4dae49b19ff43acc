"""How well steps are predicted: random mixed load on the real engine, alone and beside a process that loads the machine.

In a process with the environment and the time slices of the server's engine, whose step times were measured when it started.
Requests come at random, with prompts and answers of random lengths, and a policy that moves them over the ladder at random,
so that decode, chunks of prompts and refills mix. Each step is predicted before it runs, and learned from after.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.common import grid_engine, report
from sortserve.engine.connection import ENVIRONMENT
from sortserve.engine.cost import StepKind
from sortserve.engine.cost_model import KINDS
from sortserve.engine.engine import Engine
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.policies.protocol import Decision, Reason, View
from sortserve.engine.protocol import GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.time_slices import ask_for_short_slices

SECONDS = 100.0
WARM_STEPS = 30
TARGETS = {"alone": 0.08, "loaded": 0.12}
COVERAGE = (0.85, 0.95)
_LOAD = "import numpy as np\na = np.ones(1 << 24)\nwhile True: a *= 1.0000001"


class Wandering:
    """Moves each request to a random place now and then, and takes a random number of prompt tokens."""

    name = "wandering"

    def __init__(self) -> None:
        self._draw = np.random.default_rng(1)

    def decide(self, view: View) -> Decision:
        """A new place for one in forty, and for those that have not run."""
        anew = (self._draw.random(len(view)) < 1 / 40) | (view.place < 0)
        place = np.where(anew, self._draw.integers(0, view.rungs.full + 1, len(view)), view.place)
        reason = np.full(len(view), int(Reason.FIXED))
        chunk = int(self._draw.choice([16, 32, 64]))
        return Decision(place, reason, np.zeros(len(view), np.bool_), chunk)


def run(model: Path) -> None:
    """Print errors and coverage by kind of step."""
    if not ENVIRONMENT.items() <= os.environ.items():  # read when torch was loaded: too late here
        again = [sys.executable, "-m", "benchmarks", "prediction", "--model", str(model)]
        subprocess.run(again, env=os.environ | ENVIRONMENT, check=True)
        return
    ask_for_short_slices()
    began = time.perf_counter()
    engine = grid_engine(model, max_step_tokens=64, max_running=24, kv_bytes=1 << 30, warmup=True, profile_cache=False)
    loaded = time.perf_counter() - began
    print(
        f"loaded and profiled in {loaded:.1f} s; the machine's speed now: {engine.cost.factor if engine.cost else 0:.2f}"
    )
    engine.scheduler.policy = Wandering()
    engine.scheduler.decider.ask_every = 4
    figures: dict[str, object] = {}
    checks: dict[str, bool] = {}
    for situation, target in TARGETS.items():
        busy = subprocess.Popen([sys.executable, "-c", _LOAD]) if situation == "loaded" else None
        try:
            steps = _drive(engine, SECONDS)
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
        for kind in KINDS:
            ratios = np.array(steps[kind]).reshape(-1, 2)
            assert len(ratios), f"no {kind} steps in {SECONDS:.0f} s: the machine is too slow for this"
            error = float(np.median(np.abs(1.0 - ratios[:, 0])))
            covered = float((ratios[:, 1] <= 1.0).mean())
            figures[f"{situation}_{kind}"] = {"steps": len(ratios), "median_error": error, "p90_coverage": covered}
            print(
                f"{situation:6s} {kind:6s}: {len(ratios):4d} steps, median error {error:.1%}, p90 covers {covered:.0%}"
            )
            checks[f"{situation}, {kind}: median error at most {target:.0%}"] = error <= target
            checks[f"{situation}, {kind}: p90 covers 85-95 %"] = COVERAGE[0] <= covered <= COVERAGE[1]
    report("prediction", figures, checks)


def _drive(engine: Engine, seconds: float) -> dict[StepKind, list[tuple[float, float]]]:
    """(predicted / measured, measured / p90) of each step after the first ones, by kind."""
    cost, scheduler, draw = engine.cost, engine.scheduler, np.random.default_rng(2)
    assert cost is not None
    ratios: dict[StepKind, list[tuple[float, float]]] = defaultdict(list)
    until, step, number = time.perf_counter() + seconds, 0, 0
    while time.perf_counter() < until:
        wanted = 2 + int(6 * (1 + np.sin(step / 40)))  # the load comes and goes
        while len(scheduler.requests) < wanted:
            number += 1
            _add(engine, f"{until:.0f}-{number}", draw)
        plan = scheduler.schedule(time.monotonic())
        assert plan is not None
        shape = shape_of_parts(scheduler.rungs, plan.sequences)
        predicted, slow = float(cost.seconds(shape)), float(cost.p90(shape))
        result = engine.runner.run(plan)
        if step >= WARM_STEPS:
            ratios[shape.kind].append((predicted / result.seconds, result.seconds / slow))
        cost.observe(shape, result.seconds)
        scheduler.update(plan, result, time.monotonic())
        step += 1
    for request_id in list(scheduler.requests):
        scheduler.abort(request_id, time.monotonic())
    return ratios


def _add(engine: Engine, name: str, draw: np.random.Generator) -> None:
    num_prompt, max_tokens = int(draw.integers(8, 120)), int(draw.integers(40, 120))
    prompt = tuple(draw.integers(0, engine.info.vocab_size, num_prompt).tolist())
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    floor = engine.info.ladder.entries[0].id
    engine.scheduler.add(
        GenerateRequest(name, prompt, sampling, time.monotonic(), floor=floor, kv_mode="reuse"),
    )
