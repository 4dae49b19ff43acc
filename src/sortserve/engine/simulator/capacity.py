"""What a replica can do at most with one sub-model: closed loop, as many requests in it as it runs at a time."""

from dataclasses import replace

import numpy as np

from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.simulator.records import FINISHED, Records
from sortserve.engine.simulator.replica import Replica, ReplicaConfig
from sortserve.engine.simulator.traces import Trace, Workload


def closed_loop_rate(config: ReplicaConfig, trace: Trace, place: int, num_requests: int = 2000, seed: int = 0) -> float:
    """Requests a second with the lengths of `trace`, drawn at random, all on one place of the ladder.

    Measured between the first quarter of the requests and the last one that is let in, so that the pipeline is full.
    """
    picked = np.random.default_rng(seed).integers(0, len(trace), num_requests)
    count, never = num_requests, np.full(num_requests, np.inf)
    # a total far away makes them requests with a budget: only those may run below the full model
    workload = Workload(
        np.zeros(count),
        trace.num_prompt[picked],
        trace.num_output[picked],
        never,
        never,
        np.full(count, 1e6),
        np.zeros(count, np.bool_),
        np.full(count, -1, np.int64),
        np.zeros(count, np.int64),
    )
    records = Records(workload, len(config.rungs.exits))
    rungs = replace(config.rungs, default_floor=min(place, config.rungs.default_floor))
    replica = Replica(replace(config, rungs=rungs), FixedPolicy(place), workload, records)
    number, started, begin = 0, 0, 0.0
    while True:
        while number < count and len(replica.live) < config.max_running + 4:
            replica.submit(number)
            number += 1
        if number == count:
            break
        if not started and number > count // 4:
            started, begin = int((records.outcome == FINISHED).sum()), replica.now
        replica.advance(replica.now + 1e-9)  # one step
    return float(((records.outcome == FINISHED).sum() - started) / (replica.now - begin))
