"""Shapes of steps that are only thought of, and of the step that a plan makes: what predictions are asked for."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sortserve.engine.cost import StepCost, StepKind, StepShape
from sortserve.engine.plan import SequencePlan
from sortserve.engine.rungs import Floats, Rungs


def decode_shape(rungs: Rungs, counts: NDArray[Any], context: float = 0.0) -> StepShape:
    """A step of single rows, all of them sampled: `counts` [..., places] rows, `context` tokens each."""
    rows = counts @ rungs.runs
    share = np.where(counts[..., None] > 0, rungs.share, 0.0)
    return StepShape(
        rows.astype(np.float64),
        counts @ rungs.share,
        share.max(-2, initial=0.0),
        rows * context,
        np.zeros(rows.shape),
        counts.sum(-1).astype(np.float64),
    )


def decode_seconds(cost: StepCost, rungs: Rungs, counts: Mapping[int, float], context: float = 0.0) -> float:
    """Median seconds of a step of single rows, so many on each place."""
    return float(cost.seconds(decode_shape(rungs, by_place(rungs, counts), context)))


def steady_seconds(decode: Floats, with_prompt: Floats, full: Floats, starts: float) -> Floats:
    """Mean seconds of a step while `starts` prompts a second come, [...]: of steps that take `decode` without a prompt,
    `with_prompt` with one of them, and at most `full`. The longer the steps, the more of them have a prompt."""
    free = np.maximum(1.0 - starts * np.maximum(with_prompt - decode, 0.0), 1e-3)
    return np.minimum(decode / free, np.maximum(full, decode))


def by_place(rungs: Rungs, counts: Mapping[int, float]) -> Floats:
    """[places] of a count by place."""
    spread = np.zeros(len(rungs.exits))
    for place, count in counts.items():
        spread[place] = count
    return spread


def prefill_seconds(cost: StepCost, rungs: Rungs, place: int, num_tokens: int, step_tokens: int) -> float:
    """Median seconds until `num_tokens` prompt tokens have run on a place, with nobody else."""
    return float(cost.seconds(prefill_shape(rungs, place, num_tokens, step_tokens)).sum())


def prefill_shape(rungs: Rungs, place: int, num_tokens: int, step_tokens: int) -> StepShape:
    """The steps [chunks] that bring `num_tokens` prompt tokens to a place, with nobody else, in chunks of as many rows as
    `step_tokens` at full depth cost layers; the last row is sampled."""
    chunk = max(1, step_tokens * int(rungs.layers.sum()) // rungs.depth(place))
    start = np.arange(0, num_tokens, chunk, dtype=np.float64)
    stop = np.minimum(start + chunk, num_tokens)
    runs = rungs.runs[place].astype(np.float64)  # [segments]
    rows = (stop - start)[:, None] * runs
    return StepShape(
        rows,
        rows * rungs.share[place],
        np.broadcast_to(rungs.share[place], rows.shape),
        stop[:, None] * runs,
        np.where(rows > 1, rows * (stop[:, None] - rows / 2), 0.0),
        (stop == num_tokens).astype(np.float64),
        "mixed" if num_tokens > 1 else "decode",
    )


def shape_of_parts(rungs: Rungs, parts: Iterable[SequencePlan]) -> StepShape:
    """The shape of the step that these parts make."""
    singles, read = [0] * len(rungs.exits), [0] * len(rungs.exits)
    sampled, longer = 0, []
    for part in parts:
        sampled += part.sample is not None
        span = part.spans[0]
        if span.first_segment == 0 and part.spans[-1].stop - span.start == 1:
            singles[part.submodel] += 1
            read[part.submodel] += span.stop
        else:
            longer.append(part)
    base = decode_shape(rungs, np.array(singles))
    rows, share, widest = base.rows, base.share, base.widest
    context = (np.array(read) @ rungs.runs).astype(np.float64)
    pairs = np.zeros(rungs.num_segments)
    kind: StepKind = "mixed" if longer else "decode"
    for part in longer:
        own = np.zeros(rungs.num_segments)
        for span in part.spans:
            own[span.first_segment : span.exit] += span.stop - span.start
            kind = "refill" if span.first_segment > 0 else kind
        rows += own
        share += own * rungs.share[part.submodel]
        widest = np.maximum(widest, np.where(own > 0, rungs.share[part.submodel], 0.0))
        context += np.where(own > 0, part.stop, 0)
        pairs += np.where(own > 1, own * (part.stop - own / 2), 0.0)
    return StepShape(rows, share, widest, context, pairs, np.asarray(float(sampled)), kind)
