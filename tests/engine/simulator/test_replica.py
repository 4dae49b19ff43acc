"""The simulated replica: everybody ends once, the same run gives the same bytes, and repeated steps are no approximation."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.protocol import Decision, Policy, View
from sortserve.engine.simulator.memory import KVSizes
from sortserve.engine.simulator.records import FINISHED, REFUSED, WAITS, Records
from sortserve.engine.simulator.replica import Replica
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import Outcome, simulate
from sortserve.engine.simulator.traces import Workload
from tests.engine.simulator.little import RandomPolicy, little_config, little_workload

POLICIES: dict[str, Callable[[int], Policy]] = {
    "fixed": lambda seed: FixedPolicy(2),
    "random": lambda seed: RandomPolicy(seed),
}


def _run(config: ReplicaConfig, make: Callable[[], Policy], workload: Workload, replicas: int = 1) -> Outcome:
    return simulate(config, make, workload, replicas)


def _single(num_prompt: int, num_output: int, **budget: float) -> Workload:
    one = {name: np.array([budget.get(name, np.inf)]) for name in ("ttft", "tpot", "total")}
    return Workload(
        np.array([1.0]),
        np.array([num_prompt]),
        np.array([num_output]),
        **one,
        strict=np.array([bool(budget)]),
        group=np.array([-1]),
        shared=np.array([0]),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1e9, 40_000.0], ids=["roomy", "tight"])
@pytest.mark.parametrize("widths", [(64,), (32, 64)], ids=["depths", "widths"])
def test_every_request_ends_exactly_once(policy: str, capacity: float, widths: tuple[int, ...]) -> None:
    """`Records` asserts that nobody ends twice; memory is so short in half of the cases that requests are preempted."""
    config = little_config(widths, kv=KVSizes(64, 64, capacity))
    preempted = 0
    for seed in range(6):
        workload = little_workload(40, seed)
        records = _run(config, lambda seed=seed: POLICIES[policy](seed), workload, 1 + seed % 2).records  # type: ignore[misc]
        assert (records.outcome != WAITS).all()
        done = records.outcome == FINISHED
        assert (records.made.sum(axis=1) == np.where(done, workload.num_output, 0)).all()
        assert (records.first_token[done] > workload.arrival[done]).all()
        assert (records.last_token[done] >= records.first_token[done]).all()
        floors = np.where(workload.budgeted, config.rungs.default_floor, config.rungs.full)
        assert not records.made[np.arange(len(config.rungs.exits)) < floors[:, None]].any(), "a floor was broken"
        assert done[~workload.strict].all(), "somebody who may not be refused was"
        preempted += int(records.preempted.sum())
    assert (preempted > 0) == (capacity < 1e6)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_trace_and_seed_give_the_same_schedule(policy: str) -> None:
    workload = little_workload(60, 1)
    config = little_config(noise=0.1)
    digests = [_run(config, lambda: POLICIES[policy](5), workload, 2).digest for _ in range(2)]
    assert digests[0] == digests[1]
    assert digests[0] != _run(replace(config, noise_seed=1), lambda: POLICIES[policy](5), workload, 2).digest


@pytest.mark.parametrize("capacity", [1e9, 60_000.0], ids=["roomy", "tight"])
def test_steps_charged_together_equal_single_ones_to_the_bit(capacity: float) -> None:
    fewer = 0
    for seed in range(8):
        workload = little_workload(30, seed, rate=10.0, factor=3.0)
        config = little_config(kv=KVSizes(64, 64, capacity), noise=0.05, noise_seed=seed, stalls=((1.0, 0.2),))
        together = _run(config, lambda: FixedPolicy(1), workload)
        one_by_one = _run(replace(config, repeat=False), lambda: FixedPolicy(1), workload)
        for name in ("first_token", "last_token", "made", "met", "quality", "refilled", "switches"):
            assert (getattr(together.records, name) == getattr(one_by_one.records, name)).all(), name
        assert together.records.steps == one_by_one.records.steps
        assert together.seconds == one_by_one.seconds
        fewer += together.digest != one_by_one.digest
    assert fewer, "no step was ever repeated: the test shows nothing"


def test_a_lone_request_takes_the_time_of_its_steps_by_hand() -> None:
    """A prompt of 10 and 3 tokens at full depth: one step of 10 rows, two of one row each."""
    config = little_config()
    records = _run(config, lambda: FixedPolicy(3), _single(10, 3, total=10.0)).records

    def layers(rows: int) -> float:
        return 6 * 2 * float(np.interp(rows, [1, 32], [0.5e-3, 1e-3]))

    first = 1e-4 + 1e-4 + layers(10) + 6 * (10 * 1e-7 + 10 * (10 - 5) * 2e-8)
    step = 1e-4 + 1e-4 + layers(1)
    assert records.first_token[0] - 1.0 == pytest.approx(first)
    assert records.last_token[0] - records.first_token[0] == pytest.approx(2 * step + 6 * (11 + 12) * 1e-7)


def test_budgets_are_judged_like_the_engine_does() -> None:
    from sortserve.engine.budget import Budget

    workload = little_workload(300, 4, rate=40.0)
    records = _run(little_config(), lambda: RandomPolicy(2, 0.0), workload).records
    kinds = set()
    for i in np.flatnonzero(workload.budgeted & (records.outcome == FINISHED)).tolist():
        ms = {
            f"{name}_ms": float(value[i]) * 1e3 if np.isfinite(value[i]) else None
            for name, value in (("ttft", workload.ttft), ("tpot", workload.tpot), ("total", workload.total))
        }
        met = Budget(**ms).met(  # type: ignore[arg-type]
            float(workload.arrival[i]),
            float(records.first_token[i]),
            float(records.last_token[i]),
            int(workload.num_output[i]),
        )
        assert met == records.met[i]
        kinds.add((workload.kind[i], met))
    assert len(kinds) == 4


class _DownThenUp:
    """The full model, then the floor from the third output token on, the full model again from the sixth."""

    name = "down-then-up"

    def decide(self, view: View) -> Decision:
        low = (view.num_output >= 2) & (view.num_output < 5)
        place = np.where(low, view.floor, view.ceiling)
        return Decision(place, np.full(len(view), 3), np.zeros(len(view), np.bool_), view.step_tokens)


@pytest.mark.parametrize("resumes", [True, False])
def test_rising_again_pays_for_what_is_missing(resumes: bool) -> None:
    """Three tokens were made at the floor, so three lack deep K/V; the newest one was never computed at all."""
    config = little_config(ask_every=1)
    records = _run(config, _DownThenUp, _single(20, 8, total=10.0)).records
    assert records.made[0].tolist() == [0, 3, 0, 5]
    assert records.switches[0] == 2
    assert records.refilled[0] == 3
    assert records.switched == {"deadline-down": 1, "deadline-up": 1}


def test_a_shared_system_prompt_is_computed_once_per_settings() -> None:
    """With widths, a narrow sub-model finds nothing in what the full one computed; with depths alone everything."""
    count = 6
    never = np.full(count, np.inf)
    workload = Workload(
        np.arange(count, dtype=np.float64),
        np.full(count, 64),
        np.full(count, 2),
        never,
        never,
        np.full(count, 50.0),
        np.zeros(count, np.bool_),
        np.zeros(count, np.int64),
        np.full(count, 48),
    )
    config = little_config((32, 64))
    rungs = config.rungs
    records = Records(workload, len(rungs.exits))
    replica = Replica(config, FixedPolicy(rungs.full), workload, records)
    replica.advance(0.0)
    replica.submit(0)
    replica.advance(0.9)
    replica.submit(1)
    replica.memory.look_up(replica.live)
    same_width = [
        place for place in range(len(rungs.exits)) if rungs.settings[place, 0] == rungs.settings[rungs.full, 0]
    ]
    cached = replica.live.cached[0]
    assert [place for place in range(len(rungs.exits)) if cached[place] == 48] == same_width
    assert cached.sum() == 48 * len(same_width)
    start = replica.now
    replica.advance(start + 5.0)
    assert records.first_token[1] - start < (records.first_token[0] - 0.0) / 2, "one chunk in place of two"


def test_the_queue_is_limited_and_refusals_are_not_served() -> None:
    workload = little_workload(60, 3, rate=1e4)
    records = _run(little_config(max_waiting=10), lambda: FixedPolicy(3), workload).records
    assert (records.outcome == FINISHED).sum() <= 20
    refused = _run(little_config(), lambda: RandomPolicy(1, 1.0), workload).records
    assert (refused.outcome[workload.strict] == REFUSED).all()
    assert not refused.met[workload.strict].any()


def test_a_policy_that_lets_nobody_run_does_not_stop_the_clock() -> None:
    class Sits:
        name = "sits"

        def decide(self, view: View) -> Decision:
            count = len(view)
            place = np.where(view.now < 3.0, -1, view.ceiling)
            return Decision(place, np.zeros(count, np.int64), np.zeros(count, np.bool_), view.step_tokens)

    records = _run(little_config(), Sits, _single(5, 2, total=10.0)).records
    assert records.first_token[0] > 3.0


def test_stalls_and_a_wrong_predictor_change_times_and_beliefs_only() -> None:
    workload = _single(5, 2, total=10.0)
    quick = _run(little_config(), lambda: FixedPolicy(3), workload)
    stalled = _run(little_config(stalls=((0.5, 2.0),)), lambda: FixedPolicy(3), workload)
    assert stalled.records.first_token[0] >= quick.records.first_token[0] + 1.5
    doubtful = little_config(length_factor=3.0)
    replica = Replica(doubtful, FixedPolicy(3), workload, Records(workload, 4))
    replica.submit(0)
    assert replica.live.expected_left()[0] == 6
