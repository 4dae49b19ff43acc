"""How much the server can do, per sub-model, in a closed loop; and how fast a lone request is, which budgets follow."""

import re
from dataclasses import dataclass

import numpy as np

from benchmarks.slo.load import Texts, pinned_asks
from benchmarks.slo.serving import Served
from benchmarks.slo.wire import Outcome
from sortserve.engine.simulator.traces import Trace, Unloaded

_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_WARM_SHARE = 0.3  # of the time, before answers count: until then the batch fills
_LEAST_COUNTED = 5
_MOST_LONE = 4096  # lone requests that a loop may get through


@dataclass(frozen=True)
class Capacity:
    """What one sub-model sustains of the trace's requests, as a batch in a closed loop."""

    submodel: str
    requests_per_second: float
    output_tokens_per_second: float
    answers: int  # complete ones, from the start on
    seconds: float  # until the last of them


def capacity(
    served: Served, trace: Trace, submodel: str, texts: Texts, clients: int, seconds: float, seed: int
) -> Capacity:
    """Measure one sub-model. `seed`: another one for each loop of a server, or its prefix cache knows the prompts."""
    asked = pinned_asks(trace.num_prompt, trace.num_output, submodel, texts, seed)
    outcomes = served.closed_loop(asked, clients, seconds)
    requests, tokens = throughput(outcomes, trace, seconds)
    ends = [outcome.last for outcome in outcomes if outcome.complete]
    return Capacity(submodel, requests, tokens, len(ends), max(ends))


def throughput(outcomes: list[Outcome], trace: Trace, seconds: float) -> tuple[float, float]:
    """Requests and output tokens a second, between the last answer before the batch had filled and the last one of all.

    Raises RuntimeError if a request failed, if its prompt was known already, or if hardly any was answered.
    """
    complete = sorted(answered(outcomes), key=lambda outcome: outcome.last)
    warm = [outcome for outcome in complete if outcome.last < _WARM_SHARE * seconds]
    counted = complete[len(warm) :]
    if len(counted) < _LEAST_COUNTED:
        raise RuntimeError(f"{len(counted)} answers in {seconds:.0f} s are too few to tell; give more seconds")
    began = warm[-1].last if warm else 0.0
    measured = counted[-1].last - began
    tokens = sum(float(trace.num_output[outcome.number]) for outcome in counted)
    return len(counted) / measured, tokens / measured


def answered(outcomes: list[Outcome]) -> list[Outcome]:
    """The complete ones. Raises RuntimeError if a request failed, or if the prefix cache knew its prompt."""
    failed = [outcome for outcome in outcomes if outcome.status not in (200, 0)]
    if failed:
        raise RuntimeError(f"a request of the closed loop got {failed[0].status}: {failed[0].tail.decode()}")
    known = [cached for outcome in outcomes for cached in _CACHED.findall(outcome.tail)]
    if any(map(int, known)):
        raise RuntimeError(
            "a prompt of the closed loop was in the prefix cache: what is measured would be less than it takes"
        )
    return [outcome for outcome in outcomes if outcome.complete]


def unloaded(served: Served, trace: Trace, submodel: str, texts: Texts, seconds: float, seed: int) -> Unloaded:
    """How fast lone requests are: first tokens against prompt lengths by least squares, and the median time per token.
    Prompts of four lengths, so that the slope is one of prompts and not of noise; no prompt comes twice (see `capacity`)."""
    four = np.unique(np.quantile(trace.num_prompt, (0.1, 0.5, 0.8, 0.95)).astype(np.int64))
    lengths = np.tile(four, _MOST_LONE // len(four))
    outputs = np.full_like(lengths, max(4, int(np.median(trace.num_output))))
    asked = pinned_asks(lengths, outputs, submodel, texts, seed)
    outcomes = answered(served.closed_loop(asked, 1, seconds))
    return fit_unloaded(
        np.array([lengths[outcome.number] for outcome in outcomes], np.float64),
        np.array([outcome.first - outcome.sent for outcome in outcomes]),
        np.array([(outcome.last - outcome.first) / (outputs[outcome.number] - 1) for outcome in outcomes]),
    )


def fit_unloaded(
    num_prompt: np.ndarray[tuple[int], np.dtype[np.float64]],
    first: np.ndarray[tuple[int], np.dtype[np.float64]],
    per_token: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> Unloaded:
    """From single requests: the line through the median first token of each length. Raises RuntimeError without any."""
    if not len(first):
        raise RuntimeError("no lone request was answered; give the model more --capacity-seconds")
    lengths = np.unique(num_prompt)
    medians = np.array([np.median(first[num_prompt == length]) for length in lengths])
    slope, constant = np.polyfit(lengths, medians, 1) if len(lengths) > 1 else (0.0, medians[0])
    slope = max(0.0, float(slope))
    constant = max(0.0, float(constant)) if slope > 0 else float(np.median(first))
    return Unloaded(constant, slope, float(np.median(per_token)))
