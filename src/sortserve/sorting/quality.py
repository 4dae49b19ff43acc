"""From figures to a ladder: quality in [0, 1], `degraded`, and what is dropped as dominated.

Quality by loss: exp of the mean over domains of (full model's loss - sub-model's loss), every domain counting alike, at
most 1. Quality by a task: the sub-model's score over the full model's. A sub-model is `degraded` if it keeps less than
half of the full model on any measure there is: exp(loss gap) of one domain, or one task's score. Books flatter: on the 0.5B
model half of the FFN cost 12 % of loss there and 162 % on answers to maths questions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.ladder_file import Measured, Pair, Quality, Score
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.sorting.compare import Sums, draw_texts

BY_LOSS = "loss"
DEGRADED_UNDER = 0.5  # of the full model
METRIC_BY_LOSS = "exp(loss_full - loss), the mean over domains of text"


@dataclass(frozen=True)
class Result:
    """A sub-model as measured, before it is an entry."""

    submodel: SubModel
    method: str
    sums: Mapping[str, Sums]  # by domain
    scores: Mapping[str, Score]  # by task; empty: none were run
    token_ms: float | None = None
    id: str | None = None  # None: made from depth and mean width


def by_loss(own: Mapping[str, Sums], full: Mapping[str, Sums]) -> Quality:
    """exp of the mean loss gap over domains, with a 95 % interval from texts drawn in pairs within each domain."""
    gaps, drawn = [], []
    for name, sums in own.items():
        gap = full[name].loss - sums.loss
        draws = draw_texts(len(gap))
        gaps.append(gap.sum() / sums.tokens.sum())
        drawn.append(gap[draws].sum(1) / sums.tokens[draws].sum(1))
    value = min(1.0, math.exp(float(np.mean(gaps))))
    low, high = np.quantile(np.exp(np.mean(drawn, axis=0)), [0.025, 0.975])
    return Quality(round(value, 6), round(min(float(low), value), 6), round(min(1.0, max(float(high), value)), 6))


def by_score(own: Score, full: Score) -> Quality:
    """The score over the full model's; the interval is that of the sub-model's score alone."""
    if full.value <= 0:
        raise SortingError(
            f"the full model scores 0 of {full.questions}: no quality follows; take another task, or `loss`"
        )
    value = min(1.0, own.value / full.value)
    low, high = min(own.low / full.value, value), min(1.0, max(own.high / full.value, value))
    return Quality(round(value, 6), round(low, 6), round(high, 6))


def is_degraded(own: Result, full: Result) -> bool:
    """Whether it keeps less than half of the full model on some measure."""
    ratios = [
        math.exp(full.sums[name].figures().loss.value - sums.figures().loss.value) for name, sums in own.sums.items()
    ]
    ratios += [
        score.value / full.scores[task].value for task, score in own.scores.items() if full.scores[task].value > 0
    ]
    return bool(min(ratios, default=1.0) < DEGRADED_UNDER)


def build_ladder(
    shape: ModelShape,
    results: Sequence[Result],
    measured: Measured | None,
    *,
    quality: str = BY_LOSS,
    pairs: Sequence[Pair] = (),
    keep_dominated: bool = False,
    layer_importance: Sequence[float] = (),
) -> Ladder:
    """A ladder of what was measured, the full model among it; dominated sub-models and pairs of them are left out.

    Raises SortingError if the full model was not measured, or if `quality` names a task that was not run.
    """
    whole = SubModel.full(shape)
    full = next((result for result in results if result.submodel == whole), None)
    if full is None:
        raise SortingError("the full model was not measured, so no quality follows")
    entries: list[Entry] = []
    for result in results:
        entries.append(
            Entry(
                _free_id(result, shape, {entry.id for entry in entries}),
                result.submodel,
                _quality(result, full, quality),
                result is not full and is_degraded(result, full),
                {name: sums.figures() for name, sums in result.sums.items()},
                dict(result.scores),
                result.token_ms,
                result.method,
            )
        )
    kept = entries if keep_dominated else drop_dominated(shape, entries)
    ids = {entry.id for entry in kept}
    told = [pair for pair in pairs if {pair.prompt, pair.answer} <= ids]
    return Ladder.of(shape, kept, measured, told, layer_importance=layer_importance)


def drop_dominated(shape: ModelShape, entries: Sequence[Entry]) -> list[Entry]:
    """Without the entries that another one, no costlier, equals or beats in quality, and without degraded ones that cost as
    much as a sound one: a default floor is the smallest sound entry, and all above it may be chosen. The full model
    always stays. What is left rises in quality with cost, but that a sub-model may be as good as the full one."""
    whole = SubModel.full(shape)
    costs = {entry.id: entry.submodel.cost(shape) for entry in entries}
    # of equal cost the better first; a tie of both keeps the deeper, as `Ladder` orders them
    order = sorted(entries, key=lambda entry: (costs[entry.id], -_value(entry), -entry.submodel.depth))
    kept: list[Entry] = []
    best, sound = -1.0, False  # sound: something cheaper is not degraded
    for entry in order:
        if entry.submodel == whole or (_value(entry) > best and not (entry.degraded and sound)):
            kept.append(entry)
            best = max(best, _value(entry))
            sound = sound or not entry.degraded
    return kept


def not_monotone(ladder: Ladder) -> list[tuple[str, str]]:
    """Neighbours of which the costlier is not better, by id; empty for a ladder that `drop_dominated` made. Only the full
    model may be no better than the one below it: quality ends at 1."""
    found = []
    for place, (low, high) in enumerate(pairwise(ladder.entries)):
        worse = _value(low) > _value(high)
        if worse or (_value(low) == _value(high) and place + 1 < ladder.full):
            found.append((low.id, high.id))
    return found


def _value(entry: Entry) -> float:
    assert entry.quality is not None
    return entry.quality.value


def _quality(result: Result, full: Result, quality: str) -> Quality:
    if result is full:
        return Quality(1.0, 1.0, 1.0)
    if quality == BY_LOSS:
        return by_loss(result.sums, full.sums)
    if quality not in result.scores:
        known = ", ".join([BY_LOSS, *result.scores])
        raise SortingError(f"quality {quality!r} was not measured; there are: {known}")
    return by_score(result.scores[quality], full.scores[quality])


def _free_id(result: Result, shape: ModelShape, taken: set[str]) -> str:
    """The given id or one that tells depth, mean width and method, such as `d24-w63-search`; numbered if taken."""
    submodel = result.submodel
    made = submodel.name(shape)
    if made is None:
        share = round(100 * sum(submodel.widths) / len(submodel.widths) / shape.ffn_width)
        made = f"d{submodel.depth}-w{share}"
        made += f"-a{submodel.depth - len(submodel.skip_attention)}" if submodel.skip_attention else ""
        made += f"-{result.method}" if result.method else ""
    wanted = result.id or made
    number, free = 2, wanted
    while free in taken:
        free, number = f"{wanted}-{number}", number + 1
    return free
