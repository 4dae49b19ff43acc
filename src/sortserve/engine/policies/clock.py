"""What a policy remembers from step to step: prices, and how wrong step times were."""

from collections import deque

import numpy as np

from sortserve.engine.policies.outlook import Forecast, Outlook
from sortserve.engine.policies.prices import Prices
from sortserve.engine.policies.protocol import View

_RENEW_PRICES = 64  # decisions; the step cost is corrected while serving
_MEMORY = 15  # step times; their median decides, so that a clock jump or an idle pause counts for nothing
_PLAUSIBLE = 16.0  # a step time further off than this is a pause, a jump, or two decisions for one step
_MOST_FACTOR = 4.0


class Clock:
    """Feedback that all predicting policies share. Keeps no requests; of one row the time of arrival and its tokens made."""

    def __init__(self) -> None:
        self.factor = 1.0  # measured over predicted, in [1/4, 4]
        self.decisions = 0
        self._prices: Prices | None = None
        self._ratios: deque[float] = deque(maxlen=_MEMORY)
        self._before: tuple[float, float] | None = None  # when the last decision was made, and its step as predicted
        self._witness: tuple[float, int] | None = None  # a row of every step since: its arrival, output tokens it had

    def look(self, view: View) -> Outlook:
        """The outlook at this moment; learns how long the last steps took."""
        steps = self._steps_since(view)
        if self._before is not None and steps > 0:
            then, predicted = self._before
            ratio = (view.now - then) / max(predicted * steps, 1e-9)
            if 1.0 / _PLAUSIBLE < ratio < _PLAUSIBLE:
                self._ratios.append(ratio)
                if len(self._ratios) == _MEMORY:
                    middle = sorted(self._ratios)[_MEMORY // 2]
                    self.factor = min(max(middle, 1 / _MOST_FACTOR), _MOST_FACTOR)
        if self._prices is None or self.decisions % _RENEW_PRICES == 0:
            self._prices = Prices.of(view.cost, view.rungs, view.step_tokens)
        self.decisions += 1
        return Outlook(view, self._prices, factor=self.factor)

    def _steps_since(self, view: View) -> int:
        """How many steps there were since the last decision, by the tokens of the witness; 0 if it has ended."""
        if self._witness is None:
            return 0
        arrival, had = self._witness
        found = np.flatnonzero(view.arrival == arrival)
        return int(view.num_output[found[0]]) - had if len(found) == 1 else 0

    def note(self, view: View, forecast: Forecast, chosen: int) -> None:
        """Remember what was decided. The factor is in the prediction already and must not be learned again."""
        step = float(forecast.step[chosen])
        soon = np.flatnonzero(view.running & (forecast.first[chosen] <= step) & (view.num_output > 0))
        if len(soon):
            witness = soon[np.argmax(view.expected_left[soon])]
            self._before = (view.now, step / self.factor)
            self._witness = (float(view.arrival[witness]), int(view.num_output[witness]))
        else:
            self._before = self._witness = None
