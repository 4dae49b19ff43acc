"""The trace benchmark's simulator is slowed down to what the server's closed loops did."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.slo.simulated import Slowness, slowness
from sortserve.engine.simulator.capacity import closed_loop_rate
from sortserve.engine.simulator.traces import Trace
from tests.engine.policies.traces import config


def test_both_numbers_of_a_slower_server_are_found() -> None:
    """A server whose steps take 1.5 times its profile and 2 ms more."""
    profile = replace(config(), max_running=16)
    trace = Trace(np.zeros(50), np.full(50, 40), np.full(50, 12))
    full = profile.rungs.full
    server = Slowness(1.5, 0.002).applied(profile)
    rates = {place: closed_loop_rate(server, trace, place, 400) for place in (0, full)}
    found = slowness(profile, trace, 16, rates)
    assert found.factor == pytest.approx(1.5, rel=0.05)
    assert found.between == pytest.approx(0.002, rel=0.1)
