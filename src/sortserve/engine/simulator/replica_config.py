"""What a simulated replica is: its ladder, what steps take, memory, limits, and what is done to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sortserve.engine.cost import CostTable, StepCost
from sortserve.engine.rungs import Rungs
from sortserve.engine.simulator.memory import KVSizes


@dataclass(frozen=True)
class ReplicaConfig:
    """One replica and what is done to it. Defaults: a perfect predictor, no noise, no stalls."""

    rungs: Rungs
    cost: StepCost  # what steps take
    kv: KVSizes
    believed: CostTable | None = None  # what the policy is told that steps take, until it is corrected; None: the truth
    step_tokens: int = 2048
    max_running: int = 256
    max_waiting: int = 1024
    ask_every: int = 8  # decode-only steps between two questions to the policy
    ask_seconds: float = 0.25  # at most between two questions
    repeat: bool = True  # charge repeated steps together
    capabilities: frozenset[str] = frozenset({"refill", "sit_out", "reuse"})
    length_factor: float = 1.0  # expected answer length over the true one
    noise: float = 0.0  # standard deviation of the logarithm of step times
    noise_seed: int = 0
    stalls: Sequence[tuple[float, float]] = ()  # (when, how long) the machine stands still; the clock does not
    predicts: bool = False  # note when each request was thought to end, as it began
    patience: float = np.inf  # seconds after which a request without a budget counts as due in the order of a step
