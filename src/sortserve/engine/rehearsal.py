"""The first requests of an engine are nobody's: they load what the first one needs, and tell what is between steps.

Without them a client's first request took 13 to 28 ms to its first token where the next ones took 5 (bundled model), and was
predicted without the host's time, which is half of what a lone row of such a model takes.
"""

import time

import numpy as np

from sortserve.engine.budget import Budget
from sortserve.engine.cost_model import CostModel
from sortserve.engine.estimates import decode_shape
from sortserve.engine.plan import StepRunner
from sortserve.engine.protocol import GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.scheduler import Scheduler
from sortserve.engine.stepping import Stepper

PROMPT_TOKENS = 12
MOST_TOKENS = 48
"""Of each answer: what is between steps is learned to nine tenths in so many."""
SECONDS = 0.5
"""What each may take; two steps it takes anyhow."""


def rehearse(scheduler: Scheduler, runner: StepRunner, cost: CostModel) -> None:
    """Answer a request that may run anything, then one that is pinned to the floor. `scheduler` is of no use afterwards: it
    has counted them, and its K/V are not those that `runner` has once another one goes on. `cost` learns from the steps."""
    scheduler.cost = cost
    ladder, longest = scheduler.ladder, scheduler.limits.max_model_len
    rows = np.eye(len(ladder.entries))[ladder.full]
    step = float(cost.seconds(decode_shape(scheduler.rungs, rows, float(PROMPT_TOKENS))))
    prompt = tuple(range(min(PROMPT_TOKENS, longest // 2)))
    tokens = min(max(2, min(MOST_TOKENS, int(SECONDS / max(step, 1e-6)))), longest - len(prompt))
    sampling, budget = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0), Budget(total_ms=3.6e6)
    steps = Stepper(scheduler, runner)
    for submodel in ("auto", ladder.entries[ladder.default_floor].id):
        request_id = f"rehearsal-{submodel}"
        scheduler.add(GenerateRequest(request_id, prompt, sampling, time.monotonic(), budget, submodel))
        while scheduler.has_work:
            steps.step()
