"""The simulator against the real scheduler, K/V manager and planner, driven by a clock that a cost table moves."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from sortserve.engine.admission import Limits
from sortserve.engine.budget import Budget
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.kv import KVManager
from sortserve.engine.plan import SequenceResult, StepResult
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.protocol import FailedEvent, FinishedEvent, GenerateRequest, TokenEvent
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.scheduler import Scheduler
from sortserve.engine.simulator.records import FINISHED
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.traces import Workload
from tests.engine.simulator.little import little_config, little_workload, table
from tests.engine.small import GEOMETRY, SHAPE, small_ladder


def _request(workload: Workload, number: int) -> GenerateRequest:
    ms = {
        f"{name}_ms": float(values[number]) * 1e3 if np.isfinite(values[number]) else None
        for name, values in (("total", workload.total), ("ttft", workload.ttft), ("tpot", workload.tpot))
    }
    policy = "strict" if workload.strict[number] else "best-effort"
    budget = Budget(**ms, policy=policy) if workload.budgeted[number] else None  # type: ignore[arg-type]
    prompt = tuple((number * 7 + i) % SHAPE.vocab_size for i in range(int(workload.num_prompt[number])))
    sampling = SamplingParams(max_tokens=int(workload.num_output[number]), temperature=0.0, ignore_eos=True)
    return GenerateRequest(str(number), prompt, sampling, float(workload.arrival[number]), budget=budget)


def _drive(policy: str, config: ReplicaConfig, workload: Workload) -> dict[int, dict[str, Any]]:
    """What the real scheduler makes of it: by request, times of first and last token and sub-models of all."""
    ladder = small_ladder((64,), degraded=("d1",))
    kv = KVManager(GEOMETRY, 20_000, prefix_cache=False)
    scheduler = Scheduler(
        ladder,
        kv,
        make_policy(policy, config.rungs),
        Limits(4096, SHAPE.vocab_size, config.max_waiting),
        max_step_tokens=config.step_tokens,
        max_running=config.max_running,
        ask_every=1,
    )
    scheduler.cost = table(config)
    heard: dict[int, dict[str, Any]] = {}
    now, number = 0.0, 0
    while number < len(workload) or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, float(workload.arrival[number]))
        while number < len(workload) and workload.arrival[number] <= now:
            scheduler.add(_request(workload, number))
            number += 1
        plan = scheduler.schedule(now)
        if plan is None:
            events = scheduler.take_events()
            now += 0 if events else 1e-3
        else:
            results = tuple(SequenceResult(None if part.sample is None else 1) for part in plan.sequences)
            seconds = float(config.cost.seconds(shape_of_parts(config.rungs, plan.sequences)))
            now += seconds
            events = scheduler.update(plan, StepResult(results, seconds), now)
        for event in events:
            if isinstance(event, TokenEvent):
                told = heard.setdefault(int(event.request_id), {"first": now, "rungs": []})
                told["rungs"].append(ladder.place(event.submodel))
            elif isinstance(event, FinishedEvent):
                heard[int(event.request_id)] |= {"last": now, "met": event.summary.met}
            else:
                assert not isinstance(event, FailedEvent), "nobody is strict"
    return heard


@pytest.mark.parametrize("policy", ["fixed", "reject-only", "global-cap", "slack"])
def test_the_simulator_does_what_the_scheduler_does(policy: str) -> None:
    """Budgets kept must agree within 5 points; where nothing is refused, sub-models and times agree nearly everywhere.
    What differs: the engine reserves a refill's pages before it starts, checks strict budgets once more when a request
    comes in, and takes memory in the order of its plan."""
    same = total = 0
    kept: list[tuple[float, float]] = []
    for seed in range(4):
        workload = little_workload(24, seed, rate=15.0, factor=2.5, strict=False)
        config = little_config(ask_every=1, max_running=64)
        records = simulate(config, partial(make_policy, policy, config.rungs), workload).records
        heard = _drive(policy, config, workload)
        assert (records.outcome == FINISHED).all()
        for number in range(len(workload)):
            made = np.bincount(heard[number]["rungs"], minlength=len(config.rungs.exits))
            close = abs(heard[number]["last"] - records.last_token[number]) < 1e-6
            same += bool((made == records.made[number]).all() and close)
            total += 1
        budgeted = workload.budgeted
        kept.append(
            (
                float(records.met[budgeted].mean()),
                float(np.mean([heard[number]["met"] for number in np.flatnonzero(budgeted).tolist()])),
            )
        )
    ours, theirs = np.mean(kept, axis=0)
    assert abs(ours - theirs) <= 0.05
    assert same >= 0.9 * total, f"{same} of {total} requests agree"
