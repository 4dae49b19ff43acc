"""The price of machine time, by level: where what is asked for until the deadlines, now and by those still to come, is what
the machine can do until then.

At a price each request takes the place that maximises its mean quality minus the price of the machine time it would still
take; that is what it asks for. Supply is a horizon, part of the time that requests have from arrival to deadline. Over the
horizon the live ones ask for what they have left, and new ones, at the rate and of the kinds seen last, for all of theirs.
So a backlog raises the price before anybody is late, and without one the price is that of the load.
"""

from collections import deque

import numpy as np

from sortserve.engine.policies.outlook import Outlook
from sortserve.engine.rungs import Bools, Floats, Ints

LEVELS = 48
PRICES = np.concatenate([[0.0], 0.05 * 1.2 ** np.arange(1, LEVELS)])
"""Quality for the machine time of a mean request on its ceiling: from next to nothing to 260."""
_STEPS = (-4, -1, 0, 1, 5)  # levels that are looked at in one decision
_SEEN = 64  # arrivals remembered
_RENEW = 8  # arrivals after which it is worked out anew what they ask for
_RATE_SHARE = 1.0  # of the mean time allowed: over which arrivals are counted
_CALMING = 12.0  # levels, a factor of 9, by which the calm price falls in the mean time allowed
_LEAST_KNOWN = 0.5  # a rate is not extrapolated from less than this share of that time


class Bids:
    """What n requests would take at any price."""

    def __init__(self, worth: Floats, cost: Floats, kept: Floats) -> None:
        """`worth` [n, places] mean quality, -inf where barred; `cost` [n, places] seconds; `kept` [n] what a kept budget
        is worth beside quality; inf: never given up."""
        self._worth, self._cost = np.ascontiguousarray(worth.T), np.ascontiguousarray(cost.T)
        self._kept = kept
        # from the best place down, so that it wins ties, without those that nobody may take
        self._places = np.flatnonzero(np.isfinite(self._worth).any(axis=1))[::-1].tolist()

    def at(self, prices: Floats) -> tuple[Ints, Bools, Floats]:
        """At prices [k], in quality a second: places [k, n], who is given up [k, n], and the cost [k, n], 0 for them."""
        shape = (len(prices), len(self._kept))
        place = np.zeros(shape, np.int64)
        most = np.full(shape, -np.inf)
        for candidate in self._places:  # a handful; whole rows at a time
            value = self._worth[candidate] - prices[:, None] * self._cost[candidate]
            np.copyto(place, candidate, where=value > most)
            np.maximum(most, value, out=most)
        given_up = most + self._kept < 0
        cost = np.where(given_up, 0.0, self._cost.take(place * len(self._kept) + np.arange(len(self._kept))))
        return place, given_up, cost


class Market:
    """Finds the level of the price, a little at a time. Remembers costs of past arrivals, but no requests."""

    def __init__(self, horizon: float, utilisation: float, attainment: float) -> None:
        self.level = 0
        self._calm, self._calm_at = 0.0, 0.0  # level
        self._horizon, self._utilisation, self._attainment = horizon, utilisation, attainment
        self._seen: deque[tuple[float, Floats, Floats]] = deque(maxlen=_SEEN)  # time allowed, worth, cost
        self._unsorted = 0  # arrivals that `_each` does not know yet
        self._newest = -np.inf
        self._recent = 0.0  # arrivals, each counting less the longer ago
        self._recent_at = self._since = 0.0
        self._mean_cost = 0.0  # seconds of machine time
        self._each: Floats = np.zeros(LEVELS)  # seconds of machine time that a mean arrival asks for, by level
        self._allowed = 1.0  # seconds from arrival to deadline, on average

    def prices(self, levels: Ints) -> Floats:
        """[k] in quality a second."""
        return PRICES[levels] / max(self._mean_cost, 1e-9)

    @property
    def calm_price(self) -> float:
        """The highest price of late, falling slowly: what a promotion must be worth, since the price may rise again before
        it has paid back."""
        return float(self.prices(np.array([int(self._calm)]))[0])

    def price_of(self, share: Floats) -> Floats:
        """What shares of the machine over the horizon are worth at the present price."""
        worth: Floats = share * self._horizon * self._allowed * self.prices(np.array([self.level]))[0]
        return worth

    def learn(self, outlook: Outlook, worth: Floats) -> None:
        """Take note of who came since the last time. A clock that was set back starts anew."""
        view = outlook.view
        if view.now < self._recent_at or not self._seen:
            self._newest = -np.inf
            self._recent = 0.0
            self._since = view.now
        new = np.flatnonzero((view.arrival > self._newest) & view.budgeted & ~view.running)
        for i in new[np.argsort(view.arrival[new])].tolist():
            allows = float(view.last_due[i] - view.arrival[i])
            if not np.isfinite(allows):  # the clock of its tokens starts with the first one
                allows = float(view.first_due[i] - view.arrival[i])
            self._seen.append((allows, worth[i], outlook.cost[i]))
        span = _RATE_SHARE * self._allowed
        self._recent *= float(np.exp(-(view.now - self._recent_at) / span))
        self._recent += float(np.exp(-np.maximum(view.now - view.arrival[new], 0.0) / span).sum())
        self._recent_at = view.now
        if len(new):
            self._newest = float(view.arrival[new].max())
            self._unsorted += len(new)
            if self._unsorted >= _RENEW or len(self._seen) <= _RENEW:
                self._sort()

    def _sort(self) -> None:
        """What a mean arrival asks for."""
        self._unsorted = 0
        cost = np.array([seen[2] for seen in self._seen])
        self._mean_cost = float(cost[:, -1].mean())
        allowed = [seen[0] for seen in self._seen if np.isfinite(seen[0])]
        self._allowed = float(np.mean(allowed)) if allowed else 1.0
        bids = Bids(np.array([seen[1] for seen in self._seen]), cost, np.full(len(cost), self._attainment))
        self._each = bids.at(self.prices(np.arange(LEVELS)))[2].mean(1)

    def clear(self, outlook: Outlook, bids: Bids) -> None:
        """Move the level towards where demand meets supply."""
        view = outlook.view
        if not self._seen:
            return
        horizon, span = self._horizon * self._allowed, _RATE_SHARE * self._allowed
        levels = np.array(sorted({min(max(self.level + step, 0), LEVELS - 1) for step in _STEPS}))
        known = max(1.0 - float(np.exp(-(view.now - self._since) / span)), _LEAST_KNOWN)
        coming = self._recent / (span * known) * horizon  # arrivals within the horizon
        demand = bids.at(self.prices(levels))[2] @ view.budgeted.astype(np.float64) + self._each[levels] * coming
        self._calm -= _CALMING * max(view.now - self._calm_at, 0.0) / self._allowed
        self._calm_at = view.now
        fits = np.flatnonzero(demand * outlook.factor <= horizon * self._utilisation)
        self.level = int(levels[fits[0]] if len(fits) else levels[-1])
        self._calm = max(self._calm, float(self.level))
