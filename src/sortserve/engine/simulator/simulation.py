"""A workload through one or several replicas: who goes where, until everybody has ended."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sortserve.engine.policies.protocol import Policy
from sortserve.engine.simulator.records import Records
from sortserve.engine.simulator.replica import Replica
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import Workload


@dataclass(frozen=True)
class Outcome:
    """Records of all requests, when the last replica fell idle, and a hash of every step."""

    records: Records
    seconds: float
    digest: str


def simulate(
    config: ReplicaConfig, make_policy: Callable[[], Policy], workload: Workload, replicas: int = 1
) -> Outcome:
    """Every request goes, as it arrives, to the replica with the fewest tokens to compute; all run to their ends."""
    records = Records(workload, len(config.rungs.exits))
    fleet = [Replica(config, make_policy(), workload, records) for _ in range(replicas)]
    for number, arrival in enumerate(workload.arrival.tolist()):
        for replica in fleet:
            replica.advance(arrival)
        min(fleet, key=lambda replica: replica.load).submit(number)
    for replica in fleet:
        replica.advance(np.inf)
    return Outcome(records, max(replica.now for replica in fleet), "-".join(replica.digest() for replica in fleet))
