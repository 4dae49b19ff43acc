"""Who runs in a step and how far: the order of requests, the filling of a step, and the shape that its cost follows.

Shared by all policies, by the engine and by the simulator. Everything is vectorised over requests: at 1,000 of them a
Python loop would take longer than the step. No torch.
"""

import numpy as np

from sortserve.engine.cost import StepKind, StepShape
from sortserve.engine.policies.protocol import NEVER_RAN, View
from sortserve.engine.rungs import Bools, Floats, Ints


def held(view: View, place: Ints) -> Ints:
    """[n, segments] tokens of each request whose K/V are there, in the segments that it runs at `place`; 0 above.

    A request that has not run yet gets what the prefix cache holds for that place. With exact K/V, widths or skips other
    than the present ones count from the first segment that differs as nothing.
    """
    rungs = view.rungs
    runs = rungs.runs.T.take(place, axis=1)  # [segments, n]: along requests numpy is several times as fast
    have = np.where(runs, view.computed.T, 0)
    fresh = view.place == NEVER_RAN
    new = np.flatnonzero(fresh)
    if len(new):
        have[:, new] = np.where(runs[:, new], view.cached[new, place[new]], 0)
    moved = np.flatnonzero((place != view.place) & view.exact & ~fresh)
    if len(moved):
        differs = rungs.settings[place[moved]] != rungs.settings[view.place[moved]]
        differs &= rungs.runs[place[moved]] & rungs.runs[view.place[moved]]
        have[:, moved] = np.where(np.maximum.accumulate(differs, axis=1).T, 0, have[:, moved])
    return have.T


def start_of(view: View, place: Ints, have: Ints) -> Ints:
    """[n] first token that lacks K/V somewhere below the exit of `place`."""
    last: Ints = have[np.arange(len(have)), view.rungs.exits[place] - 1]
    return np.minimum(last, view.known - 1)  # the last known token always runs: its logits are still to be had


def rows_of(view: View, place: Ints, have: Ints, start: Ints, stop: Ints) -> Ints:
    """[n, segments] rows that bring tokens [start, stop) to `place`, each from where its K/V end or its state was kept."""
    return _rows(view.rungs.runs[place], view.resumable, have, start, stop)


def _rows(runs: Bools, resumable: Bools, have: Ints, start: Ints, stop: Ints) -> Ints:
    begin = np.where(resumable[:, None], np.maximum(start[:, None], have), start[:, None])
    # logits of the last token need all segments, even if its K/V are there already
    begin = np.minimum(begin, stop[:, None] - 1)
    return np.where(runs & (stop > start)[:, None], stop[:, None] - begin, 0)


def in_order(view: View, place: Ints, start: Ints) -> Ints:
    """Indices of those that have a place: rows that need one token only before prompts and refills, earliest deadline
    first, then by arrival."""
    return np.concatenate(_in_order(view, place, start))


def _in_order(view: View, place: Ints, start: Ints) -> tuple[Ints, Ints]:
    """The two parts of `in_order`: rows that need one token, prompts and refills."""
    order = view.order[place[view.order] >= 0]
    behind = ((view.known - start > 1) | ~view.running)[order]
    return order[~behind], order[behind]


def fill(view: View, place: Ints, chunk_tokens: int) -> tuple[Ints, Ints, Ints]:
    """How far each request comes in this step: (have [n, segments], start [n], stop [n]); stop == start runs nothing.

    Rows cost their layers. Single rows come first, and at most `chunk_tokens` rows at full depth of prompts and refills;
    all together at most `step_tokens`. Nobody starts beyond `max_running`.
    """
    runnable = np.where(place >= 0, place, 0)
    have = held(view, runnable)
    start = start_of(view, runnable, have)
    stop = start.copy()
    num_layers = view.rungs.num_layers
    left = view.step_tokens * num_layers
    singles, behind = _in_order(view, place, start)
    costs = np.cumsum(view.rungs.depths[runnable[singles]])
    taken = singles[: np.searchsorted(costs, left, side="right")]
    stop[taken] += 1
    left -= int(costs[len(taken) - 1]) if len(taken) else 0
    left = min(left, chunk_tokens * num_layers)
    num_running = int(np.count_nonzero(view.running))
    # few: a step's rows for prompts are used up by one to a handful
    for i, running in zip(behind.tolist(), view.running[behind].tolist(), strict=True):
        if left <= 0:
            break
        if not running and num_running >= view.max_running:
            continue
        count, cost = _affordable(view, i, int(runnable[i]), have[i], int(start[i]), left)
        if count == 0:
            break
        stop[i] = start[i] + count
        left -= cost
        num_running += not running
    return have, start, stop


def _affordable(view: View, i: int, place: int, have: Ints, start: int, most: int) -> tuple[int, int]:
    """As many tokens of request i from `start` as cost at most `most` rows x layers, and their cost."""
    known, resumable = int(view.known[i]), bool(view.resumable[i])
    exit = int(view.rungs.exits[place])
    layers = view.rungs.layers[:exit]
    if not resumable or int(have[0]) <= start:  # nothing refilled from kept states: every token costs the same
        each = int(layers.sum())
        count = min(known - start, most // each)
        return count, count * each

    def cost(stop: int) -> int:
        begin = np.maximum(start, have[:exit])
        return int((layers * np.maximum(stop - np.minimum(begin, stop - 1), 0)).sum())

    if cost(known) <= most:
        return known - start, cost(known)
    low, high = 0, known - start  # cost rises with the number of tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(start + middle) <= most else (low, middle)
    return (low, cost(start + low)) if low else (0, 0)


def shape_of(view: View, place: Ints, have: Ints, start: Ints, stop: Ints) -> StepShape:
    """The shape of one step."""
    rungs, places = view.rungs, len(view.rungs.exits)
    ran = np.flatnonzero(stop > start)
    at, ends = place[ran], stop[ran]
    runs = rungs.runs.astype(np.float64)
    by_place = np.bincount(at, minlength=places)
    share = rungs.share.take(at, axis=0)  # [ran, segments]
    # most have one row in every segment that they run: only the others are looked at one by one
    longer = np.flatnonzero(ends - start[ran] > 1)
    who = ran[longer]
    rows = _rows(rungs.runs[at[longer]], view.resumable[who], have[who], start[who], stop[who]).astype(np.float64)
    single = by_place - np.bincount(at[longer], minlength=places)
    share[longer] *= rows
    pairs = np.where(rows <= 1, 0.0, rows * (ends[longer, None] - rows / 2))
    return StepShape(
        single.astype(np.float64) @ runs + rows.sum(0),
        share.sum(0),
        np.where(by_place[:, None] > 0, rungs.share, 0.0).max(0, initial=0.0),
        np.bincount(at, ends, places).astype(np.float64) @ runs,
        pairs.sum(0),
        np.asarray(float(np.count_nonzero(ends == view.known[ran]))),
        kind_of(rows),
    )


def kind_of(rows: Floats) -> StepKind:
    """What kind of step these rows [n, segments] make."""
    deepening = (rows[:, :-1] < rows[:, 1:]).any()
    return "refill" if deepening else "mixed" if (rows > 1).any() else "decode"
