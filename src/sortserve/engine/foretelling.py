"""When requests that begin now will have their last token: what clients are told, and what the simulator holds against what
came. No torch.

The forecast is the one that policies admit by (`policies/outlook.py`): prompts that are ahead, the others' rows in every
step, and prompts that go on coming as of late. What it still leaves out (time between steps, batches that grow, answers of
another length than expected) is taken from the answers that ended last: they took so many times as long as foretold.
"""

import math
from collections import deque

import numpy as np

from sortserve.engine.budget import Budget
from sortserve.engine.cost import StepCost
from sortserve.engine.policies.outlook import Outlook
from sortserve.engine.policies.prices import Prices
from sortserve.engine.policies.protocol import View
from sortserve.engine.rungs import Floats, Ints
from sortserve.engine.traffic import Traffic

_KEPT = 64  # answers
_LEAST = 8  # before that many ended, the forecast stands as it is
_MOST = 4.0
_NEW_SPREAD = 1.25  # p90 over median before there are answers to tell


class Foreteller:
    """Of one engine or replica. Not thread-safe."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.factor = 1.0  # taken over foretold, of late: the median
        self.spread = _NEW_SPREAD  # and the 90th percentile over it
        self._ratios: deque[float] = deque(maxlen=_KEPT)
        self._prices: tuple[StepCost, Prices] | None = None

    def foretell(self, view: View, place: Ints, chunk_tokens: int) -> tuple[Floats, Floats]:
        """[n] seconds until the next token and until the last one expected, with everybody at `place` [n], before
        `factor`."""
        if self._prices is None or self._prices[0] is not view.cost:
            self._prices = view.cost, Prices.of(view.cost, view.rungs, view.step_tokens)
        forecast = Outlook(view, self._prices[1]).foresee(place[None], np.array([float(chunk_tokens)]))
        return forecast.first[0], forecast.last[0]

    def told(
        self, budget: Budget, arrival: float, now: float, coming: tuple[float, float], num_output: int
    ) -> tuple[float, bool]:
        """What a client hears: seconds from its arrival to its last token, and whether that keeps its budget. `coming`: of
        `foretell`, until its next token and its last one; `num_output`: tokens then."""
        first, last = (now + seconds * self.factor for seconds in coming)
        return last - arrival, budget.met(arrival, first, last, num_output)

    def ended(self, foretold: float, taken: float) -> None:
        """An answer ended that was foretold to take so long from its first row on, before `factor`."""
        if not (0.0 < foretold < math.inf and 0.0 < taken < math.inf):
            return
        self._ratios.append(taken / foretold)
        if len(self._ratios) >= _LEAST:
            middle, high = np.quantile(self._ratios, (0.5, 0.9)).tolist()
            self.factor = min(max(middle, 1 / _MOST), _MOST)
            self.spread = max(1.0, high / middle)
