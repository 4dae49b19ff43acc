"""How much faster than real time the simulator is with so many requests running at once."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.simulator.sweep import DEVICE, MODEL, TRACES
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.simulator.hardware import replica_config
from sortserve.engine.simulator.records import Records
from sortserve.engine.simulator.replica import Replica
from sortserve.engine.simulator.traces import Workload, read_trace


def speed(folder: Path, policy: str, running: int, num_requests: int) -> dict[str, float | str]:
    """Closed loop with the conversation trace's lengths and budgets that hurt nobody: `running` requests all the time, a
    new one for each that ends. Processor time, so that other work on the machine does not count."""
    config = replica_config(MODEL, DEVICE)
    # memory and rows of prompts enough for so many to run at once
    config = replace(
        config,
        max_running=running,
        max_waiting=running,
        step_tokens=8 * running,
        kv=replace(config.kv, capacity=np.inf),
    )
    trace = read_trace(folder / TRACES["conv"])
    picked = np.random.default_rng(0).integers(0, len(trace), num_requests)
    never = np.full(num_requests, np.inf)
    lengths = trace.num_prompt[picked], trace.num_output[picked]
    none, zeros = np.full(num_requests, -1, np.int64), np.zeros(num_requests, np.int64)
    late = np.full(num_requests, 1e6)
    workload = Workload(zeros.astype(np.float64), *lengths, never, never, late, zeros.astype(np.bool_), none, zeros)
    records = Records(workload, len(config.rungs.exits))
    replica = Replica(config, make_policy(policy, config.rungs), workload, records)
    number, began = 0, None
    while number < num_requests:
        while number < num_requests and len(replica.live) < running:
            replica.submit(number)
            number += 1
        replica.advance(replica.now + 0.25)
        if began is None and replica.live.running.all():  # before those that ended are replaced
            began = time.process_time(), replica.now
    assert began is not None, "they never ran all at once: more requests are needed"
    seconds, virtual = time.process_time() - began[0], replica.now - began[1]
    return {
        "policy": policy,
        "running": running,
        "real_time": virtual / seconds,
        "steps_per_second": sum(records.steps.values()) / replica.now,
    }
