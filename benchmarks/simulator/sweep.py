"""What is compared: points of trace, arrivals and load; at each, every policy on every seed, beside the bound."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sortserve.engine.policies.protocol import Policy
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.rungs import Rungs
from sortserve.engine.simulator.capacity import closed_loop_rate
from sortserve.engine.simulator.command import maker
from sortserve.engine.simulator.experiment import Result, Scenario, compare, run_policy
from sortserve.engine.simulator.hardware import replica_config
from sortserve.engine.simulator.traces import BudgetMix, read_trace

MODEL, DEVICE = "llama-3.1-8b", "h200"
TRACES = {"conv": "AzureLLMInferenceTrace_conv.csv", "code": "AzureLLMInferenceTrace_code.csv"}
BURST_LOADS, EVEN_LOADS = (0.5, 1.0, 1.5, 2.0, 3.0), (0.5, 1.0, 1.5, 2.0, 3.0)
POLICIES = ("fixed", "fixed-floor", "reject-only", "slackfit", "admission-only", "global-cap", "confidence", "slack")
MIX = BudgetMix(interactive=0.55, relaxed=0.45)
"""Everybody has a budget: a bound that must leave out those without would be too high, since policies do serve them."""
CONFIDENCE = tuple(
    {"signal": signal, "threshold": threshold} for signal in ("maximum", "q-exit") for threshold in (0.5, 0.7, 0.8, 0.9)
)


@dataclass(frozen=True)
class Point:
    """Where policies are compared."""

    trace: str
    even: bool
    load: float  # of full-size closed-loop capacity
    mix: BudgetMix = MIX


@dataclass(frozen=True)
class Setup:
    """What all points of a trace share."""

    folder: Path
    capacity: Mapping[str, float]  # requests a second of the full model, by trace
    confidence: Mapping[str, Mapping[str, Any]]  # best options, by trace
    seconds: float
    seeds: Sequence[int]
    policies: Sequence[str]


def points(traces: Sequence[str], burst: Sequence[float], even: Sequence[float]) -> Iterator[Point]:
    """All points; the dearest ones first, so that no process is left alone with one at the end."""
    for load in sorted({*burst, *even}, reverse=True):
        for trace in traces:
            if load in burst:
                yield Point(trace, False, load)
            if load in even:
                yield Point(trace, True, load)


def makers(names: Sequence[str], rungs: Rungs, confidence: Mapping[str, Any]) -> dict[str, Callable[[], Policy]]:
    """Policies by the names of this benchmark."""
    made = {}
    for name in names:
        if name == "fixed-floor":
            made[name] = maker(f"fixed:{rungs.default_floor}", rungs)
        elif name == "confidence":
            made[name] = lambda: make_policy("confidence", rungs, **confidence)
        else:
            made[name] = maker(name, rungs)
    return made


def run_point(setup: Setup, point: Point, seed: int) -> Result:
    """Every policy on one seed of a point."""
    config = replica_config(MODEL, DEVICE)
    trace = read_trace(setup.folder / TRACES[point.trace])
    scenario = Scenario(point.load * setup.capacity[point.trace], setup.seconds, even=point.even, mix=point.mix)
    policies = makers(setup.policies, config.rungs, setup.confidence[point.trace])
    return compare(policies, trace, config, scenario, [seed], bound=point.mix == MIX)


def run_all(setup: Setup, wanted: Sequence[Point], jobs: int, done: Callable[[Point, Result], None]) -> None:
    """Every point on every seed; `done` hears of each point once all of its seeds are there."""
    with ProcessPoolExecutor(jobs) as pool:
        running = [(point, [pool.submit(run_point, setup, point, seed) for seed in setup.seeds]) for point in wanted]
        for point, seeds in running:
            results = [future.result() for future in seeds]
            bounds = {seed: bound for result in results for seed, bound in result.bounds.items()}
            done(point, Result(results[0].scenario, tuple(run for result in results for run in result.runs), bounds))


def capacities(folder: Path, traces: Sequence[str]) -> dict[str, list[float]]:
    """Closed-loop requests a second of every place of the ladder, by trace."""
    config = replica_config(MODEL, DEVICE)
    found = {}
    for trace in traces:
        requests = read_trace(folder / TRACES[trace])
        found[trace] = [closed_loop_rate(config, requests, place) for place in range(len(config.rungs.exits))]
    return found


def best_confidence(
    folder: Path, trace: str, capacity: float, seconds: float, load: float = 1.5
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The options of `confidence` with the most goodput, on a seed that nothing else uses, and what each one reached."""
    config = replica_config(MODEL, DEVICE)
    requests = read_trace(folder / TRACES[trace])
    scenario = Scenario(load * capacity, seconds, mix=MIX)
    tried = []
    for options in CONFIDENCE:
        make = makers(["confidence"], config.rungs, options)["confidence"]
        summary = run_policy("confidence", make, requests, config, scenario, 1_000).summary
        tried.append({**options, "goodput": summary.goodput, "attainment": summary.attainment})
    best = int(np.argmax([each["goodput"] for each in tried]))
    return dict(CONFIDENCE[best]), tried
