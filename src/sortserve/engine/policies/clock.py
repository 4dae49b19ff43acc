"""What a policy remembers from step to step: prices, how wrong step times were, and how busy the machine is with prompts."""

from collections import deque

import numpy as np

from sortserve.engine.policies.outlook import Forecast, Outlook
from sortserve.engine.policies.prices import Prices
from sortserve.engine.policies.protocol import View

_RENEW_PRICES = 64  # decisions; the step cost is corrected while serving
_MEMORY = 15  # step times; their median decides, so that a clock jump or an idle pause counts for nothing
_PLAUSIBLE = 16.0  # a step time further off than this is a pause, a jump, or two decisions for one step
_MOST_FACTOR = 4.0
_BUSY_STEPS = 32.0  # steps over which the share of steps with prompts is smoothed


class Clock:
    """Feedback that all predicting policies share. Knows no requests."""

    def __init__(self) -> None:
        self.factor = 1.0  # measured over predicted, in [1/4, 4]
        self.busy = 0.0
        self.decisions = 0
        self._prices: Prices | None = None
        self._ratios: deque[float] = deque(maxlen=_MEMORY)
        self._before: tuple[float, float] | None = None  # when the last decision was made, and its step as predicted

    def look(self, view: View) -> Outlook:
        """The outlook at this moment; learns how long the last step took."""
        if self._before is not None:
            then, predicted = self._before
            ratio = (view.now - then) / max(predicted, 1e-9)
            if 1.0 / _PLAUSIBLE < ratio < _PLAUSIBLE:
                self._ratios.append(ratio)
                if len(self._ratios) == _MEMORY:
                    middle = sorted(self._ratios)[_MEMORY // 2]
                    self.factor = min(max(middle, 1 / _MOST_FACTOR), _MOST_FACTOR)
        if self._prices is None or self.decisions % _RENEW_PRICES == 0:
            self._prices = Prices.of(view.cost, view.rungs, view.step_tokens)
        self.decisions += 1
        return Outlook(view, self._prices, factor=self.factor, busy=self.busy)

    def note(self, view: View, forecast: Forecast, chosen: int, chunk_tokens: float) -> None:
        """Remember what was decided. The factor is in the prediction already and must not be learned again."""
        step = float(forecast.step[chosen])
        self._before = (view.now, step / self.factor) if np.isfinite(forecast.first[chosen]).any() else None
        most = chunk_tokens * float(view.rungs.layers.sum())
        self.busy += (min(1.0, float(forecast.queue[chosen]) / most) - self.busy) / _BUSY_STEPS
