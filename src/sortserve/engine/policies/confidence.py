"""`confidence`: the depth of the next token from how sure the last one was, as early-exit research does, at a batch.

Two signals. `maximum`: Sorted LLaMA's, the maximum probability at the exit; above `threshold` the next token runs
shallower, in proportion, down to the floor at certainty. `q-exit`: PALBERT's rule with one hazard for all exits, a logistic
function of the same signal: lambda, exit at the first place where 1 - (1 - lambda)^(place + 1) exceeds q. Heads are read in
any case, since the signal is the token's own distribution; going deeper again costs refills, which the engine charges.
The policy looks at no deadline; admission is the shared one.
"""

from typing import Literal

import numpy as np

from sortserve.engine.policies.admission import settle, turned_away
from sortserve.engine.policies.baselines import chunks, reasons
from sortserve.engine.policies.clock import Clock
from sortserve.engine.policies.protocol import Decision, Reason, View
from sortserve.engine.rungs import Floats, Ints

Signal = Literal["maximum", "q-exit"]
SIGNALS: tuple[Signal, ...] = ("maximum", "q-exit")


class Confidence:
    """See the module. `steepness` of the logistic function, whose middle is `threshold`."""

    name = "confidence"
    wants_confidence = True  # of the back end: it costs a softmax a row

    def __init__(
        self, threshold: float = 0.8, signal: Signal = "maximum", q: float = 0.5, steepness: float = 12.0
    ) -> None:
        """Raises ValueError for a signal that there is not, or numbers outside of (0, 1)."""
        if signal not in SIGNALS:
            raise ValueError(f"no signal {signal!r}; there are: {', '.join(SIGNALS)}")
        for label, value in (("threshold", threshold), ("q", q)):
            if not 0 < value < 1:
                raise ValueError(f"{label} is {value}, must be between 0 and 1")
        self._threshold, self._signal, self._q, self._steepness = threshold, signal, q, steepness
        self._clock = Clock()

    def decide(self, view: View) -> Decision:
        """See the class."""
        outlook = self._clock.look(view)
        known = np.isfinite(view.confidence)
        sure = np.where(known, view.confidence, 0.0)
        wanted = self._maximum(view, sure) if self._signal == "maximum" else self._q_exit(view, sure)
        place = np.clip(np.where(known, wanted, view.ceiling), view.floor, view.ceiling)
        forecast = outlook.foresee(place[None], chunks(view, 1))
        self._clock.note(view, forecast, 0)
        dropped = turned_away(outlook, forecast.late(view)[0], outlook.hopeless(view.ceiling))
        reason = reasons(view, place, Reason.CONFIDENCE)
        return settle(outlook, place, reason, dropped, view.step_tokens, self._clock.decisions)

    def _maximum(self, view: View, sure: Floats) -> Ints:
        part = np.clip((sure - self._threshold) / (1.0 - self._threshold), 0.0, 1.0)
        place: Ints = np.rint(view.ceiling - part * (view.ceiling - view.floor)).astype(np.int64)
        return place

    def _q_exit(self, view: View, sure: Floats) -> Ints:
        hazard = 1.0 / (1.0 + np.exp(-self._steepness * (sure - self._threshold)))
        exits = np.log(1.0 - self._q) / np.log1p(-np.clip(hazard, 1e-9, 1 - 1e-9))
        place: Ints = np.minimum(np.floor(exits), view.rungs.full).astype(np.int64)
        return place
