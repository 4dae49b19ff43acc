"""The best that any policy could have done with a workload: a linear program that knows the future.

Each request is refused, or answered with any mix of sub-models: `share[i, p]` of its output tokens come from place p, and
they may add up to less than one (a part of a request counts as that part of a kept budget). Work is machine time, charged
at the least that it can cost in any step: its computing, each row's own K/V, its logits, and its part of what a step takes
whatever its rows. It must be done between arrival and deadline: of the prompt by the time the first token is due, of the
rest by the time the last one is. A second of clock has one second of machine time.

What a step takes whatever its rows (`base`, and of each layer that runs the `gap` below which no number of rows brings it)
may be charged in two ways; the program takes the one that comes to more:

- to output tokens. A step gives a request at most one, and at most `max_running` requests take part, so of a step that runs
  a segment each of its tokens that ran there owes 1 / `max_running`, and the parts add up to no more than the step took. A
  row then costs `slope`: layer(r) >= gap + slope x r for every number of rows that a step can have.
- to rows. At most `step_tokens` x layers of them run in a step, counted by layers, so each owes that part of `base`; and a
  row costs layer(r) / r at the number of rows, among those a step can have, where that is least.

It stays an upper bound because every relaxation only helps: steps have no order and no minimum length, memory never is
short, prefixes are free, requests without a budget cost nothing (or, with `patience`, the full model's work by then), and
windows are widened to whole time buckets. A token at depth d needs all tokens before it at d: if a share u of the output
tokens runs in a segment, at least the share u of the prompt's cost there is charged (in truth: all of it), and of the
context read at least what the first tokens, whose context is shortest, would read.
"""

from dataclasses import dataclass, replace

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.errors import SortServeError
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs
from sortserve.engine.simulator.traces import Workload


@dataclass(frozen=True)
class Bound:
    """Upper bounds over all policies."""

    goodput: float  # sum of quality over requests that keep their budgets
    met: float  # number of requests that keep their budgets


@dataclass(frozen=True)
class _Work:
    """Least machine time of each request (rows) on each place from the floor on (columns), seconds."""

    prompt: Floats  # [n, rungs]
    rest: Floats  # [n, rungs]


def best(
    workload: Workload,
    rungs: Rungs,
    cost: CostTable,
    *,
    step_tokens: int,
    max_running: int,
    replicas: int = 1,
    bucket: float = 0.5,
    patience: float = np.inf,
) -> Bound:
    """The bound of goodput and of attainment. Needs scipy."""
    rates = least_rates(workload, rungs, cost, step_tokens, max_running)
    goodput = _solve(workload, rungs, rates, replicas, bucket, patience, rungs.quality)
    met = _solve(workload, rungs, rates, replicas, bucket, patience, np.ones(len(rungs.quality)))
    return Bound(goodput, met)


def _solve(
    workload: Workload,
    rungs: Rungs,
    rates: "Rates",
    replicas: int,
    bucket: float,
    patience: float,
    worth: Floats,
) -> float:
    """The most of `worth` [places], summed over requests with a budget."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise SortServeError("the bound needs scipy; pip install 'sortserve[simulate]'") from error
    places = _places_worth(rungs, worth)
    budgeted = np.flatnonzero(workload.budgeted)
    work = least_work(workload, rungs, rates, places)
    first_due, last_due = _dues(workload)
    # one job is work within a window; interactive requests have two: the prompt's and the rest's
    timed = np.isfinite(workload.ttft)[budgeted]
    jobs = [
        _Jobs(budgeted[timed], work.prompt[budgeted[timed]], first_due[budgeted[timed]]),
        _Jobs(budgeted[timed], work.rest[budgeted[timed]], last_due[budgeted[timed]]),
        _Jobs(budgeted[~timed], (work.prompt + work.rest)[budgeted[~timed]], last_due[budgeted[~timed]]),
    ]
    if patience < np.inf:
        others = np.flatnonzero(~workload.budgeted)
        full = least_work(workload, rungs, rates, np.array([rungs.full]))
        must = (full.prompt + full.rest)[others]
        jobs.append(_Jobs(others, must, workload.arrival[others] + patience, must=True))
    program = _Program(workload, budgeted, jobs, len(places), bucket, replicas)
    values = np.zeros(program.num_variables)
    values[: len(budgeted) * len(places)] = np.tile(worth[places], len(budgeted))
    matrix = coo_array((program.values, (program.rows, program.columns)), (program.num_rows, len(values)))
    solved = linprog(-values, A_ub=matrix.tocsr(), b_ub=program.limits, bounds=(0, None), method="highs-ipm")
    if solved.status == 2 and patience < np.inf:  # those without a budget alone are too much: then they are left out
        return _solve(workload, rungs, rates, replicas, bucket, np.inf, worth)
    assert solved.status == 0, solved.message
    return float(-solved.fun)


def _places_worth(rungs: Rungs, worth: Floats) -> Ints:
    """Places from the floor on; where all are worth the same, only the floor."""
    places = np.arange(rungs.default_floor, len(rungs.quality))
    return places[:1] if np.ptp(worth[places]) == 0 else places


def _dues(workload: Workload) -> tuple[Floats, Floats]:
    """[n] when first and last token are due at the latest."""
    first = workload.arrival + workload.ttft
    gaps = workload.num_output - 1
    with np.errstate(invalid="ignore"):
        paced = np.where(gaps > 0, first + gaps * workload.tpot, first)
    return first, np.minimum(paced, workload.arrival + workload.total)


@dataclass(frozen=True)
class Rates:
    """The least seconds that work can cost, see the module."""

    layer: float  # a row in a layer without its FFN
    ffn: float  # a row in a whole FFN
    head: float  # logits of a row
    context: float  # per layer and K/V token read
    pair: float  # per layer and query x context pair of a chunk
    token: Floats  # [places] an output token made there: its part of the steps


def least_rates(workload: Workload, rungs: Rungs, cost: CostTable, step_tokens: int, max_running: int) -> Rates:
    """Of the two ways to charge steps the one that charges the workload more."""
    # a refill may run in one segment alone
    most_rows = step_tokens * rungs.num_layers / int(rungs.layers.min())
    gap, slope = _line_below(cost, cost.layer, step_tokens, most_rows)
    by_rows = Rates(
        _least_rate(cost, cost.layer, most_rows) + cost.base / (step_tokens * rungs.num_layers),
        _least_rate(cost, cost.ffn, most_rows),
        _least_rate(cost, cost.head, max_running),
        cost.context_seconds,
        min(cost.pair_seconds, cost.context_seconds),  # one row at a time pays context instead
        np.zeros(len(rungs.exits)),
    )
    by_tokens = replace(by_rows, layer=slope, token=(cost.base + gap * rungs.depths) / max_running)
    places = np.arange(rungs.default_floor, len(rungs.exits))
    charged = [least_work(workload, rungs, rates, places) for rates in (by_rows, by_tokens)]
    totals = [float((work.prompt + work.rest).sum()) for work in charged]
    return by_tokens if totals[1] > totals[0] else by_rows


def least_work(workload: Workload, rungs: Rungs, rates: Rates, places: Ints) -> _Work:
    """See the module: [n, places] seconds, linear in the shares."""
    prompt = workload.num_prompt - np.minimum(workload.shared, workload.num_prompt - 1)
    cached = workload.num_prompt - prompt
    pairs = (workload.num_prompt.astype(np.float64) ** 2 - cached.astype(np.float64) ** 2) / 2
    outputs = workload.num_output.astype(np.float64)
    rows = outputs - 1  # the last output token never runs
    count, floor_exit = len(workload), int(rungs.exits[places[0]])
    work = _Work(np.zeros((count, len(places))), np.zeros((count, len(places))))
    runs = rungs.runs[places]
    # a prompt may be narrower than the answer
    share = np.where(rungs.runs, rungs.share, np.inf)[places].min(axis=0)
    for segment in range(rungs.num_segments):
        layers = int(rungs.layers[segment])
        context = layers * rates.context
        here = runs[:, segment]
        if not here.any():
            continue
        ahead = prompt * (layers * rates.layer + share[segment] * rates.ffn) + context * workload.num_prompt
        ahead = ahead + layers * rates.pair * pairs
        work.prompt[:, here] += ahead[:, None]
        row = layers * rates.layer + rungs.share[places, segment] * rates.ffn  # [places]
        if segment < floor_exit:
            work.rest[:] += (
                rows[:, None] * row + (context * (rows * workload.num_prompt + rows * (rows + 1) / 2))[:, None]
            )
            continue
        # k = u x outputs - 1 rows at least run here, with u the sum of the shares that do; k P + k rows / 2 - rows^2 / 8
        # is a tangent of the context that the first k of them read
        each = context * (workload.num_prompt + rows / 2)
        narrow = row[here].min()
        work.rest[:, here] += outputs[:, None] * (row[here] + each[:, None])
        work.rest[:] -= (narrow + each + context * rows**2 / 8)[:, None]
    work.rest[:] += outputs[:, None] * (rates.head + rates.token[places])
    return work


def _least_rate(cost: CostTable, term: Floats, most_rows: float) -> float:
    """The least seconds a row of a term, in a step of up to `most_rows`."""
    rows = np.append(cost.buckets[cost.buckets <= most_rows], most_rows)
    return float((cost._at(term, rows) / rows).min())


def _line_below(cost: CostTable, term: Floats, touched: float, most_rows: float) -> tuple[float, float]:
    """Gap and slope of a line that a term is nowhere below, for 1 to `most_rows` rows: through its value at `touched` rows,
    if that can be. Both are at least 0."""
    rows = np.append(cost.buckets[cost.buckets <= most_rows], [1.0, touched, most_rows])
    values, reached = cost._at(term, rows), float(cost._at(term, np.asarray(touched)))
    fewer = rows < touched
    slope = float(((reached - values[fewer]) / (touched - rows[fewer])).max(initial=0.0))
    gap = float((values - slope * rows).min())  # between its buckets a term is straight
    return (gap, slope) if gap >= 0 else (0.0, _least_rate(cost, term, most_rows))


@dataclass(frozen=True)
class _Jobs:
    """Work that must be done between arrival and `due`."""

    request: Ints  # [k] rows of the workload
    work: Floats  # [k, places] seconds if the whole request ran there
    due: Floats  # [k]
    must: bool = False  # be done in any case: then `work` has one column


class _Program:
    """The matrix, as triplets. Variables: shares [budgeted x places], pieces of work at nodes, flows between nodes.

    Time buckets are the leaves of a binary tree. A window is a few whole subtrees, work enters at their roots and flows
    down to leaves, which have a capacity: a window of 40 buckets takes at most 10 variables instead of 40.
    """

    def __init__(
        self, workload: Workload, budgeted: Ints, jobs: list[_Jobs], num_places: int, bucket: float, replicas: int
    ) -> None:
        ends = [float(job.due.max()) for job in jobs if len(job.due)]
        buckets = int(max(ends, default=0.0) / bucket) + 1
        leaves = 1 << max(buckets - 1, 1).bit_length()
        self._triplets: list[tuple[Ints, Ints, Floats]] = []
        self.limits = np.zeros(0)
        self.num_variables = len(budgeted) * num_places
        self._choices(len(budgeted), num_places)
        nodes_at = self._tree(leaves, bucket * replicas)
        place_of: Ints = np.zeros(len(workload), np.int64)
        place_of[budgeted] = np.arange(len(budgeted))
        for job in jobs:
            released = (workload.arrival[job.request] / bucket).astype(np.int64)
            until = np.minimum((job.due / bucket).astype(np.int64) + 1, leaves)
            self._work(job, place_of[job.request], released, until, leaves, nodes_at, num_places)
        self.rows = np.concatenate([rows for rows, _, _ in self._triplets])
        self.columns = np.concatenate([columns for _, columns, _ in self._triplets])
        self.values = np.concatenate([values for _, _, values in self._triplets])

    @property
    def num_rows(self) -> int:
        """Number of inequalities."""
        return len(self.limits)

    def _add(self, rows: Ints, columns: Ints, values: Floats | float) -> None:
        self._triplets.append((rows, columns, np.broadcast_to(np.asarray(values, np.float64), rows.shape)))

    def _more_rows(self, limits: Floats) -> int:
        first = len(self.limits)
        self.limits = np.append(self.limits, limits)
        return first

    def _choices(self, count: int, num_places: int) -> None:
        """Shares of a request add up to at most one."""
        first = self._more_rows(np.ones(count))
        variables = np.arange(count * num_places)
        self._add(first + variables // num_places, variables, 1.0)

    def _tree(self, leaves: int, capacity: float) -> int:
        """A row per node (node 1 is the root, 2v and 2v + 1 are the children of v); returns the row of node 0."""
        limits = np.zeros(2 * leaves)
        limits[leaves:] = capacity
        first = self._more_rows(limits)
        children = np.arange(2, 2 * leaves)
        flows = self.num_variables + np.arange(len(children))
        self.num_variables += len(children)
        self._add(first + children, flows, 1.0)
        self._add(first + children // 2, flows, -1.0)
        return first

    def _work(
        self, job: _Jobs, position: Ints, released: Ints, until: Ints, leaves: int, nodes_at: int, num_places: int
    ) -> None:
        count = len(position)
        if not count:
            return
        first = self._more_rows(-job.work[:, 0] if job.must else np.zeros(count))
        if not job.must:
            rows = np.repeat(first + np.arange(count), num_places)
            columns = (position[:, None] * num_places + np.arange(num_places)).ravel()
            self._add(rows, columns, job.work.ravel())
        owners, nodes = subtrees(released, until, leaves)
        pieces = self.num_variables + np.arange(len(owners))
        self.num_variables += len(owners)
        self._add(first + owners, pieces, -1.0)
        self._add(nodes_at + nodes, pieces, 1.0)


def subtrees(start: Ints, stop: Ints, leaves: int) -> tuple[Ints, Ints]:
    """Whole subtrees that make up the leaves [start, stop) of each job: (job, node) pairs."""
    low, high = start + leaves, stop + leaves
    owners, nodes = [], []

    def emit(chosen: Bools, at: Ints) -> None:
        owners.append(np.flatnonzero(chosen))
        nodes.append(at[chosen])

    while (low < high).any():
        left = (low < high) & (low & 1 == 1)
        emit(left, low)
        low = low + left
        right = (low < high) & (high & 1 == 1)
        high = high - right
        emit(right, high)
        low, high = low >> 1, high >> 1
    return np.concatenate(owners), np.concatenate(nodes)
