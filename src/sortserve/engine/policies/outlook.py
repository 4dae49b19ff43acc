"""What lies ahead: the work left of every request from its present state, and when its tokens would come.

All policies predict with this. Requests with prompts or refills are served in earliest-deadline order by steps of a given
size; rows that need one token each take part in every step. The time of such a step comes from the step cost, so it
follows the deepest row, not the sum; what a row more would cost alone plays no part.
"""

from dataclasses import dataclass

import numpy as np

from sortserve.engine.cost import StepShape
from sortserve.engine.estimates import steady_seconds
from sortserve.engine.policies.prices import Prices
from sortserve.engine.policies.protocol import NEVER_RAN, View
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs


@dataclass(frozen=True, slots=True)
class Forecast:
    """What k candidates would lead to, for n requests. Seconds from now; nothing comes of those that sit out: inf."""

    step: Floats  # [k] the next step
    first: Floats  # [k, n] until the next token
    last: Floats  # [k, n] until the last expected token

    def late(self, view: View, margin: float | Floats = 1.0) -> Bools:
        """[k, n] who would miss its deadline if everything took `margin` times as long."""
        margins = np.asarray(margin, np.float64).reshape(-1, 1)
        missed: Bools = self.last * margins > view.last_due - view.now
        missed |= (self.first * margins > view.first_due - view.now) & (view.num_output == 0)
        return missed


def first_difference(rungs: Rungs) -> Ints:
    """[places, places] first segment that two places both run, but not alike; the number of segments if there is none."""
    both = rungs.runs[:, None] & rungs.runs[None]
    differs = both & (rungs.settings[:, None] != rungs.settings[None])
    return np.where(differs.any(-1), differs.argmax(-1), rungs.num_segments)


class Outlook:
    """The present state in the terms of prediction; made anew for every decision.

    `work` [n, places] rows x layers to run before the next token, at least one row; `rows` [n, places] tokens they span;
    `cost` [n, places] seconds of machine time to the end, of it `ahead` to the next token and `rest` from there; `order` [n]
    earliest deadline first, then arrival.

    What is [n, places] is a transposed [places, n] array here: along hundreds of requests numpy is several times as fast
    as along a handful of places.
    """

    def __init__(self, view: View, prices: Prices) -> None:
        self.view, self.prices = view, prices
        self.depth = view.rungs.depths  # [places]
        self.left: Floats = view.expected_left.astype(np.float64)
        self.known: Floats = view.known.astype(np.float64)
        work, rows = self._work()  # [places, n], as all arrays below
        self.work, self.rows = work.T, rows.T
        self.order = view.order
        row, pair, context = prices.row[:, None], prices.pair[:, None], prices.context[:, None]
        pure = work / self.depth[:, None]  # rows, as if all ran all layers of the place
        later = self.left - 1.0  # the first of them comes with the rows above
        tokens = row + context * (self.known + self.left / 2) + prices.sample
        ahead, rest = pure * (row + pair * (self.known - rows / 2)), later * tokens
        self.ahead: Floats = ahead.T
        self.rest: Floats = rest.T
        self.cost: Floats = (ahead + rest).T

    def _work(self) -> tuple[Floats, Floats]:
        """[places, n] each."""
        view, rungs = self.view, self.view.rungs
        known, last = self.known, self.known - 1
        have = np.minimum(view.computed.T, last, order="C")  # [segments, n]
        fresh = view.place == NEVER_RAN
        start = have[rungs.exits - 1]
        new = np.flatnonzero(fresh)
        start[:, new] = np.minimum(view.cached[new].T, last[new])
        rows = known - start
        work: Floats = rungs.layers_run @ (known - have)  # whole numbers: exact in any order of adding
        anew = np.flatnonzero(fresh | ~view.resumable)
        work[:, anew] = rows[:, anew] * self.depth[:, None]
        tied = np.flatnonzero(view.exact & ~fresh & (view.floor < view.ceiling))
        if len(tied):
            self._recompute(tied, have.T, work.T, rows.T)
        return work, rows

    def _recompute(self, tied: Ints, have: Floats, work: Floats, rows: Floats) -> None:
        """Exact K/V: places of other widths start from the first token in the segments that differ."""
        rungs, known = self.view.rungs, self.known[tied, None]
        segment = first_difference(rungs)[self.view.place[tied]]  # [tied, places]
        again = segment < rungs.exits
        below = np.zeros((len(tied), rungs.num_segments + 1))
        below[:, 1:] = np.cumsum((known - have[tied]) * rungs.layers, axis=1)
        layers_below = np.concatenate([[0], np.cumsum(rungs.layers)])
        kept = np.take_along_axis(below, segment, axis=1) + known * (self.depth - layers_below[segment])
        redone = np.where(self.view.resumable[tied, None], kept, known * self.depth)
        work[tied] = np.where(again, redone, work[tied])
        rows[tied] = np.where(again, known, rows[tied])

    def whole_cost(self) -> Floats:
        """[n] seconds of machine time of the whole request on its ceiling, from the first token to the last."""
        view, prices, at = self.view, self.prices, self.view.ceiling
        prompt, answer = view.num_prompt, view.num_output + self.left
        tokens = prices.row[at] + prices.context[at] * (prompt + answer / 2) + prices.sample
        cost: Floats = prompt * (prices.row[at] + prices.pair[at] * prompt / 2) + answer * tokens
        return cost

    def late_alone(self, margin: Floats) -> Bools:
        """[n, places] who misses its deadline at a place even if the machine had nothing else to do, `margin` [n, places]
        times as slow as predicted."""
        every = np.arange(len(self.depth))[:, None]
        return self._late_alone(every, self.rows.T, self.work.T, margin.T).T

    def hopeless(self, place: Ints) -> Bools:
        """[n] who misses its deadline at `place` even if the machine had nothing else to do."""
        return self._late_alone(place, self.of(self.rows, place), self.of(self.work, place), 1.0)

    def _late_alone(self, place: Ints, rows: Floats, work: Floats, slower: Floats | float) -> Bools:
        """Of places [places, 1] or [n], with `rows` and `work` there."""
        view, prices = self.view, self.prices
        alone = prices.alone[place] * slower
        first = np.where(rows > 1, work / self.depth[place] * prices.row[place] * slower, alone)
        last = first + (self.left - 1) * alone
        late: Bools = (view.now + first > view.first_due) & (view.num_output == 0)
        return view.budgeted & (late | (view.now + last > view.last_due))

    def of(self, table: Floats, place: Ints) -> Floats:
        """[..., n] what a table [n, places] has for each request at its `place` [..., n]."""
        count = len(self.view)
        return table.T.take(place * count + np.arange(count))

    def foresee(self, place: Ints, chunk_tokens: Floats) -> Forecast:
        """Forecast k candidates: places [k, n] (negative: sits out), rows at full depth of prompts in a step [k]."""
        view = self.view
        takes_part = place >= 0
        place = np.maximum(place, 0)
        behind = takes_part & ((self.of(self.rows, place) > 1) | ~view.running)
        queue = np.where(behind, self.of(self.work, place), 0.0)
        most = np.maximum(chunk_tokens, 1.0) * float(view.rungs.layers.sum())  # [k] rows x layers of a step
        total = queue.sum(1)
        wait = self._wait_for_place(behind & ~view.running)  # steps
        now = queue if wait is None else np.where(wait > 0, 0.0, queue)  # what the next step could take of
        part = np.minimum(1.0, most / (now.sum(1) + 1e-9))
        mixed, decode, later = self._step_times(place, takes_part & ~behind, now, part, chunk_tokens)
        num_steps = np.ceil(total / most)[:, None]
        waiting = self.order[np.any(behind, axis=0)[self.order]]  # often few
        ahead = np.cumsum(queue[:, waiting], axis=1)
        steps = np.ones_like(queue)
        steps[:, waiting] = np.where(behind[:, waiting], np.ceil(ahead / most[:, None]), 1.0)
        first = steps * mixed[:, None]
        if wait is not None:
            first = first + wait * mixed[:, None]
        to_come = self.left - 1
        # tokens that come while the present queue lasts
        beside = np.minimum(np.maximum(num_steps - steps, 0.0), to_come)
        last = first + beside * mixed[:, None] + (to_come - beside) * later[:, None]
        if not takes_part.all():
            first[~takes_part] = np.inf
            last[~takes_part] = np.inf
        return Forecast(np.where(total > 0, mixed, decode), first, last)

    def _wait_for_place(self, waits: Bools) -> Floats | None:
        """[k, n] steps until enough of those that run have ended; None if nobody has to wait."""
        view = self.view
        if len(view) <= view.max_running:
            return None
        place = np.empty(waits.shape)
        place[:, self.order] = np.cumsum(waits[:, self.order], axis=1)
        too_many = np.maximum(place + int(view.running.sum()) - view.max_running, 0.0)
        stay = float(self.left[view.running].mean()) if view.running.any() else 0.0
        return np.where(waits, too_many * stay / view.max_running, 0.0)

    def _step_times(
        self, place: Ints, single: Bools, queue: Floats, part: Floats, chunk_tokens: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """[k] seconds of the next step, of one without prompts, and on average of those to come, in which the prompts of
        others begin as of late. `part` [k]: of the queue that a step takes."""
        view, rungs = self.view, self.view.rungs
        candidates, places = len(place), len(rungs.exits)
        flat = (place + places * np.arange(candidates)[:, None]).ravel()

        def by_place(of: Ints, weights: Floats | None = None) -> Floats:
            """[k, places] how many are `of` a candidate and place, numbered in a row, or the sum of their weights."""
            sums = np.bincount(of, weights, candidates * places)
            return sums.astype(np.float64, copy=False).reshape(candidates, places)

        waiting = np.flatnonzero(queue)  # often few
        queuing = flat[waiting]
        singles = by_place(flat[single.ravel()])
        context = by_place(flat, np.where(single, self.known, 0.0).ravel())
        queued = by_place(queuing, queue.ravel()[waiting])
        chunk = queued * part[:, None] / self.depth  # [k, places] rows
        mean_context = (queue @ self.known) / (queue.sum(1) + 1e-9)  # whole numbers: exact in any order of adding
        joined = by_place(queuing)  # whose prompts are done one day
        mix = singles + joined
        total = np.maximum(mix.sum(1, keepdims=True), 1.0)
        mix = mix / total
        later = mix * np.minimum(total, view.max_running)
        # who comes takes the places of those that are here
        most = chunk_tokens[:, None] * float(rungs.layers.sum()) / self.depth
        begun = np.minimum(view.start_rows, most) * mix
        filled = most * mix
        rows = np.concatenate([singles + chunk, later, later + begun, later + filled])
        half = view.start_rows / 2
        pairs = np.concatenate([chunk * (mean_context / 2)[:, None], np.zeros_like(chunk), begun * half, filled * half])
        runs = rungs.runs.astype(np.float64)
        per_candidate = (4, candidates, rungs.num_segments)
        shape = StepShape(
            (rows @ runs).reshape(per_candidate),
            (rows @ rungs.share).reshape(per_candidate),
            np.where((rows > 0).T[:, :, None], rungs.share[:, None], 0.0).max(0).reshape(per_candidate),
            context @ runs,
            (pairs @ runs).reshape(per_candidate),
            singles.sum(1),
            "mixed",
        )
        mixed, decode, with_prompt, full = view.cost.seconds(shape)
        return mixed, decode, steady_seconds(decode, with_prompt, full, view.starts)
