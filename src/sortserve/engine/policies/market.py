"""The prices of machine time, by deadline: where what is asked for, now and by those still to come, is what can be done.

Each request has two jobs: what leads to its next token, due when that is due, and the rest, due with its last token. At
given prices it takes the place that maximises its mean quality minus what both jobs cost. With the earliest deadline
served first, all are in time if for every time t the work due by t fits into the time until t. Each of these constraints
that binds has a price, and a job pays those of all times from its deadline on, so the later it is due the less it pays:
the dual of the linear program in `simulator/bound.py`, for those who are here. Those still to come are counted at the rate
and of the kinds seen last, as far as they will be due by t. A backlog or a burst makes early deadlines dear before anybody
is late; later ones only become so if the load stays.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from sortserve.engine.policies.outlook import Outlook
from sortserve.engine.rungs import Bools, Floats, Ints

LEVELS = 48
PRICES = np.concatenate([[0.0], 0.05 * 1.2 ** np.arange(1, LEVELS)])
"""Quality for the machine time of a mean request on its ceiling: from next to nothing to 260."""
_EDGES = 2.0 ** np.arange(-5.0, 2.6, 0.5)
"""Times from now at which what is due is held against what can be done, in mean times allowed."""
_MEAN = 10  # the edge at one mean time allowed
_SEEN = 64  # arrivals remembered
_RENEW = 8  # arrivals after which it is worked out anew what they ask for
_RATE_SHARE = 1.0  # of the mean time allowed: over which arrivals are counted
_CALMING = 12.0  # levels, a factor of 9, by which the calm price falls in the mean time allowed
_LEAST_KNOWN = 0.5  # a rate is not extrapolated from less than this share of that time


class Bids:
    """What n requests would take at any prices."""

    def __init__(self, worth: Floats, ahead: Floats, rest: Floats, kept: Floats) -> None:
        """`worth` [n, places] mean quality, -inf where barred; `ahead`, `rest` [n, places] seconds of the two jobs; `kept`
        [n] what a kept budget is worth beside quality; inf: never given up."""
        self._worth = np.ascontiguousarray(worth.T)
        self._ahead, self._rest = np.ascontiguousarray(ahead.T), np.ascontiguousarray(rest.T)
        self._kept = kept
        # from the best place down, so that it wins ties, without those that nobody may take
        self._places = np.flatnonzero(np.isfinite(self._worth).any(axis=1))[::-1].tolist()

    def at(self, ahead: Floats, rest: Floats) -> tuple[Ints, Bools]:
        """At prices of the two jobs [k, n], in quality a second: places [k, n], and who is given up [k, n]."""
        place = np.zeros(ahead.shape, np.int64)
        most = np.full(ahead.shape, -np.inf)
        for candidate in self._places:  # a handful; whole rows at a time
            value = self._worth[candidate] - ahead * self._ahead[candidate] - rest * self._rest[candidate]
            np.copyto(place, candidate, where=value > most)
            np.maximum(most, value, out=most)
        return place, most + self._kept < 0

    def demand(self, ahead: Floats, rest: Floats) -> tuple[Floats, Floats]:
        """Seconds of the two jobs [k, n] that are asked for at these prices; 0 for who is given up."""
        place, given_up = self.at(ahead, rest)
        count = len(self._kept)
        at = place * count + np.arange(count)
        return np.where(given_up, 0.0, self._ahead.take(at)), np.where(given_up, 0.0, self._rest.take(at))


class Market:
    """Finds the prices. Remembers costs of past arrivals, but no requests."""

    def __init__(self, utilisation: float, reserve: float, attainment: float) -> None:
        self._levels: Ints = np.zeros(len(_EDGES), np.int64)  # by deadline
        self._calm, self._cleared_at = 0.0, 0.0  # level; when `clear` looked last
        self._utilisation, self._reserve, self._attainment = utilisation, reserve, attainment
        # seconds allowed for the first token and for all, worth, cost of the two jobs
        self._seen: deque[tuple[float, float, Floats, Floats, Floats]] = deque(maxlen=_SEEN)
        self._unsorted = 0  # arrivals that `_each` does not know yet
        self._newest = -np.inf
        self._recent = 0.0  # arrivals, each counting less the longer ago
        self._recent_at = self._since = 0.0
        self._mean_cost = 0.0  # seconds of machine time
        self._each: Floats = np.zeros((LEVELS, len(_EDGES)))  # what an arrival a second asks for, by level and deadline
        self._allowed = 1.0  # seconds from arrival to deadline, on average

    @property
    def level(self) -> int:
        """The level of what is due in the mean time allowed."""
        return int(self._levels[_MEAN])

    def prices(self, levels: Ints) -> Floats:
        """The prices of these levels, in quality a second."""
        return PRICES[levels] / max(self._mean_cost, 1e-9)

    @property
    def calm_price(self) -> float:
        """The highest price of late, falling slowly: what a promotion must be worth, since the price may rise again before
        it has paid back."""
        return float(self.prices(np.array([int(self._calm)]))[0])

    def price_of(self, share: Floats) -> Floats:
        """What shares of the machine over the mean time allowed are worth at the present price."""
        worth: Floats = share * self._allowed * self.prices(np.array([self.level]))[0]
        return worth

    def levels_of(self, outlook: Outlook) -> tuple[Ints, Ints]:
        """[n] the levels that the two jobs of each request pay."""
        first, last = self._due(outlook)
        return self._levels[first], self._levels[last]

    @property
    def _edges(self) -> Floats:
        """Seconds from now."""
        return _EDGES * self._allowed

    def _due(self, outlook: Outlook) -> tuple[Ints, Ints]:
        """[n] by which edge the two jobs are due."""
        view, edges = outlook.view, self._edges
        most = len(edges) - 1
        last = np.minimum(np.searchsorted(edges, view.last_due - view.now), most)
        first = np.searchsorted(edges, view.first_due - view.now)
        return np.where(view.num_output == 0, np.minimum(first, last), last), last

    def is_old(self, now: float) -> bool:
        """Whether the levels are those of a load that has gone: nobody has looked for as long as a request has time."""
        return now - self._cleared_at > self._allowed

    def learn(self, outlook: Outlook, worth: Floats) -> None:
        """Take note of who came since the last time, but for those whom nothing can help: no price changes what they run,
        and their deadlines say nothing about others' time.

        What is decided beside a step is for its predicted end, so the next decision may be for a moment before that. Only a
        clock that was set back further starts anew."""
        view = outlook.view
        if view.now < self._recent_at - self._allowed or not self._seen:
            self._newest = -np.inf
            self._recent = 0.0
            self._since = self._recent_at = view.now
        now = max(view.now, self._recent_at)
        new = np.flatnonzero((view.arrival > self._newest) & view.budgeted & ~view.running)
        if len(new):
            self._newest = float(view.arrival[new].max())
            new = new[~outlook.hopeless(view.floor)[new]]
        for i in new[np.argsort(view.arrival[new])].tolist():
            last = float(view.last_due[i] - view.arrival[i])
            first = min(float(view.first_due[i] - view.arrival[i]), last)
            if not np.isfinite(last):  # the clock of its tokens starts with the first one
                last = first
            self._seen.append((first, last, worth[i], outlook.ahead[i], outlook.rest[i]))
        span = _RATE_SHARE * self._allowed
        self._recent *= float(np.exp(-(now - self._recent_at) / span))
        self._recent += float(np.exp(-np.maximum(now - view.arrival[new], 0.0) / span).sum())
        self._recent_at = now
        if len(new):
            self._unsorted += len(new)
            if self._unsorted >= _RENEW or len(self._seen) <= _RENEW:
                self._sort()

    def _sort(self) -> None:
        """What arrivals ask for."""
        self._unsorted = 0
        first, last = np.array([seen[0] for seen in self._seen]), np.array([seen[1] for seen in self._seen])
        worth, ahead, rest = (np.array([seen[place] for seen in self._seen]) for place in (2, 3, 4))
        self._mean_cost = float((ahead + rest)[:, -1].mean())
        allowed = last[np.isfinite(last)]
        self._allowed = float(np.mean(allowed)) if len(allowed) else 1.0
        bids = Bids(worth, ahead, rest, np.full(len(last), self._attainment))
        price = np.repeat(self.prices(np.arange(LEVELS))[:, None], len(last), axis=1)
        early, late = bids.demand(price, price)
        edges = self._edges
        self._each = early @ np.maximum(edges - first[:, None], 0.0) + late @ np.maximum(edges - last[:, None], 0.0)
        self._each /= len(last)

    def clear(self, outlook: Outlook, bids: Bids) -> None:
        """Find the levels at which demand meets supply by every deadline. Quality is sold from what the reserve leaves;
        where that would give somebody up, the reserve is sold too."""
        view = outlook.view
        if not self._seen:
            return
        first, last = self._due(outlook)
        demand = self._demand(outlook, bids, first, last)
        levels = self._levels_for(demand, 1.0 - self._reserve)
        prices = self.prices(levels)
        if self._reserve and bids.at(prices[first][None], prices[last][None])[1].any():
            levels = self._levels_for(demand, 1.0)
        self._levels = levels
        self._calm -= _CALMING * max(view.now - self._cleared_at, 0.0) / self._allowed
        self._cleared_at = view.now
        self._calm = max(self._calm, float(self.level))

    def _demand(self, outlook: Outlook, bids: Bids, first: Ints, last: Ints) -> Callable[[Ints], Floats]:
        """The share [edges] of the machine time that can be counted on until each edge that is asked for by then, at levels
        [edges]. `first`, `last` [n]: by which edge jobs are due."""
        edges = self._edges
        span = _RATE_SHARE * self._allowed
        known = max(1.0 - float(np.exp(-(outlook.view.now - self._since) / span)), _LEAST_KNOWN)
        coming = self._each * (self._recent / (span * known))
        supply = edges * (self._utilisation * outlook.prices.sure)
        each = np.arange(len(edges))

        def demand(levels: Ints) -> Floats:
            prices = self.prices(levels)
            ahead, rest = bids.demand(prices[first][None], prices[last][None])
            due = np.bincount(first, ahead[0], len(edges)) + np.bincount(last, rest[0], len(edges))
            share: Floats = (np.cumsum(due) + coming[levels, each]) / supply
            return share

        return demand

    @staticmethod
    def _levels_for(demand: Callable[[Ints], Floats], most: float) -> Ints:
        """The levels at which no more than the share `most` is asked for, the latest constraint that binds first."""
        levels = np.zeros(len(_EDGES), np.int64)
        while True:
            lacking = np.flatnonzero((demand(levels) > most) & (levels < LEVELS - 1))
            if not len(lacking):
                return levels
            upto = int(lacking[-1]) + 1
            low, high = int(levels[upto - 1]), LEVELS - 1  # too low, and the most there is
            while high - low > 1:
                levels[:upto] = middle = (low + high) // 2
                low, high = (middle, high) if demand(levels)[upto - 1] > most else (low, middle)
            levels[:upto] = high
