"""The runner of `--backend simulated`: it takes as long as a cost model says and makes up tokens.

Everything else is the real thing: HTTP, scheduler, policies, K/V bookkeeping. So load tools and the console can be tried
without the machine, on a model folder of which only config.json, the tokenizer and the ladder are read. Answers are
random tokens, the same for the same seed; grammars and log-probabilities are not
simulated, and a request that asks for them ends with an error.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sortserve.engine.cost import CostTable
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.ladder import Ladder
from sortserve.engine.plan import Plan, SampleSpec, SequenceResult, StepResult
from sortserve.engine.rungs import Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.simulator.hardware import cost_of, device_of
from sortserve.engine.submodel import ModelShape

_MULTIPLIER = 2654435761  # Knuth's: neighbouring seeds and positions give unrelated tokens


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """A step of a device that works on its own."""

    wait: Callable[[], StepResult]

    def result(self) -> StepResult:
        """Its result; waits until it is over."""
        return self.wait()


class SimulatedRunner:
    """Runs nothing. `cost` is what steps take, known beforehand: no warm-up is needed. Like a GPU it works beside the host,
    one step after the other."""

    def __init__(
        self,
        cost: CostTable,
        rungs: Rungs,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.cost = cost
        self._rungs = rungs
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._sleep = sleep
        self._free_at = 0.0  # when the last step launched will be over

    @classmethod
    def of(cls, device: str, shape: ModelShape, ladder: Ladder, eos_token_ids: tuple[int, ...]) -> "SimulatedRunner":
        """A model of `shape` on a device of `hardware.py`. Raises ValueError for an unknown one."""
        rungs = Rungs.of(ladder, SettingsTable(ladder))
        return cls(cost_of(shape, rungs.layers, device_of(device)), rungs, shape.vocab_size, eos_token_ids)

    def run(self, plan: Plan) -> StepResult:
        """One step: wait, then a token for each sequence that wants one."""
        return self.launch(plan).result()

    def launch(self, plan: Plan) -> SimulatedStep:
        """A step that begins now, or when the one before it is over."""
        began = time.perf_counter()
        results = tuple(
            SequenceResult(None) if part.sample is None else self._token(part.sample, plan.confidence)
            for part in plan.sequences
        )
        seconds = float(self.cost.seconds(shape_of_parts(self._rungs, plan.sequences)))
        ends = self._free_at = max(began, self._free_at) + seconds

        def wait() -> StepResult:
            self._sleep(max(0.0, ends - time.perf_counter()))
            return StepResult(results, seconds)

        return SimulatedStep(wait)

    def _token(self, spec: SampleSpec, confidence: bool) -> SequenceResult:
        if spec.params.grammar is not None or spec.params.logprobs is not None:
            return SequenceResult(None, error="the simulated back end has no grammars and no log-probabilities")
        token = (spec.seed * 31 + spec.position) * _MULTIPLIER % 2**32 % self._vocab_size
        while token in self._eos:
            token = (token + 1) % self._vocab_size
        return SequenceResult(token, confidence=0.5 if confidence else None)
