"""Policies side by side: the same requests and budgets for each, several seeds, beside what is possible.

A seed draws where in the trace the requests are taken from, and their budgets. `even` takes the bursts out: arrivals are
independent at the same rate, so what is left is the sustained load.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.policies.protocol import Policy
from sortserve.engine.simulator.bound import Bound, best
from sortserve.engine.simulator.hardware import unloaded
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.summary import Summary, summarize
from sortserve.engine.simulator.traces import BudgetMix, Trace, Workload, draw_budgets


@dataclass(frozen=True)
class Scenario:
    """What is asked of one replica or several."""

    rate: float  # requests a second
    seconds: float  # of trace
    replicas: int = 1
    even: bool = False  # without bursts
    mix: BudgetMix = BudgetMix()  # noqa: RUF009 - frozen
    system_prompt: int = 0  # tokens that half of the requests begin with; 0: none
    bound_bucket: float = 0.5  # seconds


@dataclass(frozen=True)
class Run:
    """One policy on one seed."""

    policy: str
    seed: int
    summary: Summary
    speed: float  # virtual seconds a second


@dataclass(frozen=True)
class Result:
    """All policies and seeds of a scenario, and the bound of each seed, per second like goodput."""

    scenario: Scenario
    runs: tuple[Run, ...]
    bounds: Mapping[int, Bound]  # by seed; empty if not asked for

    def of(self, policy: str) -> list[Run]:
        """The runs of a policy, by seed."""
        return [run for run in self.runs if run.policy == policy]


def workload_of(trace: Trace, config: ReplicaConfig, scenario: Scenario, seed: int) -> Workload:
    """The requests of a seed. Raises ValueError if the trace has too few for the rate and the time."""
    count = round(scenario.rate * scenario.seconds)
    first = int(np.random.default_rng(seed).integers(0, len(trace)))
    taken = trace.stretch(first, count, scenario.seconds)
    if scenario.even:
        taken = taken.evened(seed)
    workload = draw_budgets(taken, unloaded(config), seed, scenario.mix)
    return workload.sharing(scenario.system_prompt, 0.5, seed) if scenario.system_prompt else workload


def run_policy(
    name: str,
    make: Callable[[], Policy],
    trace: Trace,
    config: ReplicaConfig,
    scenario: Scenario,
    seed: int,
) -> Run:
    """One policy on one seed."""
    workload = workload_of(trace, config, scenario, seed)
    started = time.process_time()
    outcome = simulate(replace(config, noise_seed=seed), make, workload, scenario.replicas)
    took = max(time.process_time() - started, 1e-9)
    return Run(name, seed, summarize(outcome, config, scenario.seconds), outcome.seconds / took)


def bound_of(trace: Trace, config: ReplicaConfig, scenario: Scenario, seed: int) -> Bound:
    """The bound of one seed: goodput a second, and attainment as a share."""
    assert isinstance(config.cost, CostTable), "the bound reads the terms of the cost"
    workload = workload_of(trace, config, scenario, seed)
    bound = best(
        workload,
        config.rungs,
        config.cost,
        step_tokens=config.step_tokens,
        max_running=config.max_running,
        replicas=scenario.replicas,
        bucket=scenario.bound_bucket,
        patience=config.patience,
    )
    return Bound(bound.goodput / scenario.seconds, bound.met / max(int(workload.budgeted.sum()), 1))


def compare(
    policies: Mapping[str, Callable[[], Policy]],
    trace: Trace,
    config: ReplicaConfig,
    scenario: Scenario,
    seeds: Sequence[int],
    *,
    bound: bool = True,
) -> Result:
    """Every policy on every seed."""
    runs = [run_policy(name, make, trace, config, scenario, seed) for seed in seeds for name, make in policies.items()]
    bounds = {seed: bound_of(trace, config, scenario, seed) for seed in seeds} if bound else {}
    return Result(scenario, tuple(runs), bounds)


def find_replicas(
    make: Callable[[], Policy],
    trace: Trace,
    config: ReplicaConfig,
    scenario: Scenario,
    seeds: Sequence[int],
    attainment: float,
    most: int = 64,
) -> tuple[int, float] | None:
    """The fewest replicas with which the mean attainment over seeds is at least `attainment`, and what it is then; None
    if `most` are too few. Doubles, then halves the gap."""

    def reached(replicas: int) -> float:
        at = replace(scenario, replicas=replicas)
        return float(np.mean([run_policy("", make, trace, config, at, s).summary.attainment for s in seeds]))

    known: dict[int, float] = {}
    high = 1
    while (known.setdefault(high, reached(high))) < attainment:
        if high >= most:
            return None
        high = min(high * 2, most)
    low = high // 2  # too few
    while high - low > 1:
        middle = (low + high) // 2
        known[middle] = reached(middle)
        low, high = (low, middle) if known[middle] >= attainment else (middle, high)
    return high, known[high]
