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
    have = view.computed.copy()
    fresh = view.place == NEVER_RAN
    if fresh.any():
        have[fresh] = view.cached[fresh, place[fresh], None]
    moved = view.exact & ~fresh & (place != view.place)
    if moved.any():
        differs = rungs.settings[place[moved]] != rungs.settings[view.place[moved]]
        differs &= rungs.runs[place[moved]] & rungs.runs[view.place[moved]]
        have[moved] = np.where(np.maximum.accumulate(differs, axis=1), 0, have[moved])
    return np.where(rungs.runs[place], have, 0)


def start_of(view: View, place: Ints, have: Ints) -> Ints:
    """[n] first token that lacks K/V somewhere below the exit of `place`."""
    exits = view.rungs.exits[place]
    last: Ints = np.take_along_axis(have, exits[:, None] - 1, axis=1)[:, 0]
    return np.minimum(last, view.known - 1)  # the last known token always runs: its logits are still to be had


def rows_of(view: View, place: Ints, have: Ints, start: Ints, stop: Ints) -> Ints:
    """[n, segments] rows that bring tokens [start, stop) to `place`, each from where its K/V end or its state was kept."""
    begin = np.where(view.resumable[:, None], np.maximum(start[:, None], have), start[:, None])
    # logits of the last token need all segments, even if its K/V are there already
    begin = np.minimum(begin, stop[:, None] - 1)
    rows = np.where(view.rungs.runs[place], stop[:, None] - begin, 0)
    return np.where((stop > start)[:, None], rows, 0)


def in_order(view: View, place: Ints, start: Ints) -> Ints:
    """Indices of those that have a place: rows that need one token only before prompts and refills, earliest deadline
    first, then by arrival."""
    behind = view.known - start > 1
    order = np.lexsort((view.arrival, view.next_due, behind | ~view.running))
    return order[place[order] >= 0]


def fill(view: View, place: Ints, chunk_tokens: int) -> tuple[Ints, Ints, Ints]:
    """How far each request comes in this step: (have [n, segments], start [n], stop [n]); stop == start runs nothing.

    Rows cost their layers. Single rows come first, and at most `chunk_tokens` rows at full depth of prompts and refills;
    all together at most `step_tokens`. Nobody starts beyond `max_running`.
    """
    runnable = np.where(place >= 0, place, 0)
    have = held(view, runnable)
    start = start_of(view, runnable, have)
    stop = start.copy()
    num_layers = int(view.rungs.layers.sum())
    left = view.step_tokens * num_layers
    order = in_order(view, place, start)
    single = (view.known - start == 1)[order] & view.running[order]
    singles, behind = order[single], order[~single]
    costs = np.cumsum(view.rungs.runs[runnable[singles]] @ view.rungs.layers)
    taken = singles[costs <= left]
    stop[taken] = start[taken] + 1
    left -= int(costs[len(taken) - 1]) if len(taken) else 0
    left = min(left, chunk_tokens * num_layers)
    num_running = int(view.running.sum())
    for i in behind.tolist():  # few: a step's rows for prompts are used up by one to a handful
        if left <= 0:
            break
        if not view.running[i] and num_running >= view.max_running:
            continue
        count, cost = _affordable(view, i, int(runnable[i]), have[i], int(start[i]), left)
        if count == 0:
            break
        stop[i] = start[i] + count
        left -= cost
        num_running += not view.running[i]
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
    runnable = np.where(place >= 0, place, 0)
    rows: Floats = rows_of(view, runnable, have, start, stop).astype(np.float64)
    active: Bools = rows > 0
    share = view.rungs.share[runnable]
    single = rows <= 1
    context = np.where(active, stop[:, None], 0)
    pairs = np.where(single, 0.0, rows * (stop[:, None] - rows / 2))
    return StepShape(
        rows.sum(0),
        (rows * share).sum(0),
        np.where(active, share, 0.0).max(0, initial=0.0),
        context.sum(0).astype(np.float64),
        pairs.sum(0),
        np.asarray(float(((stop == view.known) & (stop > start)).sum())),
        kind_of(rows),
    )


def kind_of(rows: Floats) -> StepKind:
    """What kind of step these rows [n, segments] make."""
    deepening = (rows[:, :-1] < rows[:, 1:]).any()
    return "refill" if deepening else "mixed" if (rows > 1).any() else "decode"
