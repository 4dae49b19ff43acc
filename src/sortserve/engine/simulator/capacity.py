"""Closed loops: what a replica can do at most with one sub-model, and how long it takes for given requests."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.simulator.records import FINISHED, Records
from sortserve.engine.simulator.replica import Replica
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import Ints, Trace, Workload


def closed_loop_rate(config: ReplicaConfig, trace: Trace, place: int, num_requests: int = 2000, seed: int = 0) -> float:
    """Requests a second with the lengths of `trace`, drawn at random, all on one place of the ladder, as many in it as the
    replica runs at a time.

    Measured between the first quarter of the requests and the last one that is let in, so that the pipeline is full.
    """
    picked = np.random.default_rng(seed).integers(0, len(trace), num_requests)
    started, begin = 0, 0.0
    for let_in, answered, now in _loop(config, trace, picked, place, config.max_running + 4):
        if let_in == num_requests:
            break
        if not started and let_in > num_requests // 4:
            started, begin = answered, now
    return (answered - started) / (now - begin)


def closed_loop_seconds(config: ReplicaConfig, trace: Trace, place: int, clients: int, num_answers: int) -> float:
    """Seconds until so many answers are there, of `clients` that ask for the requests of `trace` in its order, round and
    round, all on one place of the ladder."""
    asked = np.arange(num_answers + clients) % len(trace)
    return next(now for _, answered, now in _loop(config, trace, asked, place, clients) if answered >= num_answers)


def _loop(
    config: ReplicaConfig, trace: Trace, asked: Ints, place: int, clients: int
) -> Iterator[tuple[int, int, float]]:
    """Before each step: how many of the requests `asked` of `trace` were let in and answered until when."""
    count, never = len(asked), np.full(len(asked), np.inf)
    # a total far away makes them requests with a budget: only those may run below the full model
    workload = Workload(
        np.zeros(count),
        trace.num_prompt[asked],
        trace.num_output[asked],
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
    number = 0
    while True:
        while number < count and len(replica.live) < clients:
            replica.submit(number)
            number += 1
        yield number, int((records.outcome == FINISHED).sum()), replica.now
        replica.advance(replica.now + 1e-9)  # one step
