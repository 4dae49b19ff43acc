"""The trace benchmark's simulator is slowed down to what the server's closed loops did."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.slo.capacity import Capacity
from benchmarks.slo.simulated import Slowness, slowness
from sortserve.engine.simulator.capacity import closed_loop_seconds
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import Trace
from tests.engine.policies.traces import config
from tests.engine.small import small_ladder

LADDER = small_ladder((64,))
CLIENTS = 8
FEW = 25
"""Answers of a loop: as few as a slow model gives in the seconds of one."""


def loops(server: ReplicaConfig, trace: Trace, slower_floor: float = 1.0) -> list[Capacity]:
    """What a benchmark's closed loops measure of such a server."""
    found = []
    for place, factor in ((0, slower_floor), (server.rungs.full, 1.0)):
        seconds = closed_loop_seconds(server, trace, place, CLIENTS, FEW) * factor
        found.append(Capacity(LADDER.entries[place].id, 0.0, 0.0, FEW, seconds))
    return found


def uneven(seed: int) -> Trace:
    """Lengths that differ as those of real traces do."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (np.maximum(rng.lognormal(mean, 1.0, 50).astype(np.int64), 1) for mean in (3.5, 2.0))
    return Trace(np.zeros(50), prompts, outputs)


def test_both_numbers_of_a_slower_server_are_found() -> None:
    """A server whose steps take 1.5 times its profile and 2 ms more, from few requests of any lengths."""
    profile = config()
    for seed in range(3):
        trace = uneven(seed)
        found = slowness(profile, trace, LADDER, CLIENTS, loops(Slowness(1.5, 0.002).applied(profile), trace))
        assert found.factor == pytest.approx(1.5, rel=0.02)
        assert found.between == pytest.approx(0.002, rel=0.05)


def test_nothing_is_taken_back_between_steps() -> None:
    """A floor faster than any server with this profile: the factor is between what the two loops say."""
    profile, trace = config(), uneven(0)
    found = slowness(profile, trace, LADDER, CLIENTS, loops(profile, trace, slower_floor=0.9))
    assert found.between == 0.0
    assert 0.9 < found.factor < 1.0


def test_a_loop_takes_the_requests_in_order() -> None:
    """One client: the time of two answers is that of the first two requests."""
    replica = replace(config(), repeat=False)
    trace = Trace(np.zeros(3), np.array([40, 20, 60]), np.array([3, 5, 2]))
    one = [Trace(np.zeros(1), trace.num_prompt[at : at + 1], trace.num_output[at : at + 1]) for at in range(2)]
    alone = [closed_loop_seconds(replica, each, replica.rungs.full, 1, 1) for each in one]
    assert closed_loop_seconds(replica, trace, replica.rungs.full, 1, 2) == pytest.approx(sum(alone))
