"""The scheduler and the runner together, without the server: steps as the engine makes them."""

import time

import numpy as np

from benchmarks.gpu.common import Clock
from benchmarks.gpu.model import Bench
from sortserve.engine.admission import Limits
from sortserve.engine.kv import KVManager
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.protocol import GenerateRequest
from sortserve.engine.rungs import Rungs
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.scheduler import Scheduler
from sortserve.engine.settings import SettingsTable
from sortserve.engine.stepping import Stepper


def scheduled(bench: Bench, batch: int, steps: int, clock: Clock, *, ahead: bool) -> list[float]:
    """Seconds of whole steps of `batch` decoding requests, as the engine makes them: each planned and launched `ahead`,
    while the one before it runs, or after it."""
    setup, prompt = bench.setup, 8
    rungs = Rungs.of(bench.ladder, SettingsTable(bench.ladder))
    scheduler = Scheduler(
        bench.ladder,
        KVManager(bench.geometry, bench.num_pages),
        make_policy("fixed", rungs, place=bench.full),
        Limits(setup.context, setup.shape.vocab_size, 1000),
        max_running=setup.max_running,
    )
    stepper = Stepper(scheduler, bench.runner, ahead=ahead)
    for number in range(batch):
        tokens = tuple(np.random.default_rng(number).integers(0, setup.shape.vocab_size, prompt).tolist())
        sampling = SamplingParams(max_tokens=setup.context - prompt - 1, temperature=0.0, ignore_eos=True)
        scheduler.add(GenerateRequest(f"o{number}", tokens, sampling, time.monotonic(), None))
    while any(request.num_output < 3 for request in scheduler.requests.values()):
        stepper.step()
    taken = []
    for _ in range(steps):
        if clock.spent():
            break
        began = time.perf_counter()
        stepper.step()
        taken.append(time.perf_counter() - began)
    return taken
