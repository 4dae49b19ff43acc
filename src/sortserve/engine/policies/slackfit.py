"""`slackfit`: SuperServe's policy (NSDI'25), carried over to steps.

There a query runs once; (sub-network, batch size) pairs are kept in buckets of latency, and the most urgent query's slack
names the bucket, out of which the pair with the highest accuracy is taken. Here a request needs many steps: its slack is
divided by the steps it still needs, and "batch size" is the number of prompt rows that a step takes.
"""

import numpy as np

from sortserve.engine.policies.admission import settle, turned_away
from sortserve.engine.policies.baselines import reasons
from sortserve.engine.policies.lookout import Lookout
from sortserve.engine.policies.protocol import Decision, Reason, View
from sortserve.engine.rungs import Bools, Floats

_PARTS = np.array([1.0, 0.5, 0.25])  # of the most rows that a step takes


class SlackFit:
    """See the module. `buckets` of equal length span the times of all pairs."""

    name = "slackfit"

    def __init__(self, buckets: int = 16) -> None:
        self._buckets = buckets
        self._lookout = Lookout()

    def decide(self, view: View) -> Decision:
        """See the class."""
        outlook = self._lookout.look(view)
        places = np.arange(view.floor[view.budgeted].min(initial=view.rungs.full), view.rungs.full + 1)
        place = np.clip(np.repeat(places, len(_PARTS))[:, None], view.floor, view.ceiling)
        chunk = np.tile(_PARTS * view.step_tokens, len(places))
        forecast = outlook.foresee(place, chunk)
        hopeless = outlook.hopeless(view.floor)
        stretch = self._stretch(view, forecast.first, forecast.last, hopeless)  # how far the times may grow
        edges = np.linspace(forecast.step.min(), forecast.step.max(), self._buckets + 1)
        bucket = np.searchsorted(edges, forecast.step, side="left")  # a pair counts as slow as its bucket's end
        grown = edges[np.minimum(bucket, self._buckets)] / forecast.step
        fits = stretch >= grown if len(view) else np.ones(len(chunk), np.bool_)
        if fits.any():
            chosen = int(np.lexsort((chunk, np.repeat(places, len(_PARTS)), fits))[-1])
        else:
            chosen = int(np.lexsort((chunk, stretch))[-1])
        dropped = turned_away(outlook, forecast.late(view)[chosen], hopeless)
        reason = reasons(view, place[chosen], Reason.DEADLINE)
        return settle(outlook, place[chosen], reason, dropped, int(chunk[chosen]), self._lookout.decisions)

    @staticmethod
    def _stretch(view: View, first: Floats, last: Floats, hopeless: Bools) -> Floats:
        """[k] the most urgent request's time over what it needs; those that nothing helps are not asked."""
        asked = view.budgeted & ~hopeless
        if not asked.any():
            return np.full(len(first), np.inf)
        urgent = int(np.flatnonzero(asked)[np.argmin(view.next_due[asked])])
        stretch: Floats = (view.last_due[urgent] - view.now) / last[:, urgent]
        if view.num_output[urgent] == 0:
            stretch = np.minimum(stretch, (view.first_due[urgent] - view.now) / first[:, urgent])
        return stretch
