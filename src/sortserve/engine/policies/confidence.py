"""`confidence`: the depth of the next token from signals of the last one, as early-exit research does, at a batch.

Two signals. `maximum`: Sorted LLaMA's, the maximum probability at the exit; above `threshold` the next token runs
shallower, in proportion, down to the floor at certainty. `q-exit`: PALBERT's rule, exit at the first place where the
probability that nothing deeper is needed exceeds q, by the checkpoint's depth head (`depth_head.py`). Where there is none,
one hazard for all exits stands in, a logistic function of the maximum probability: 1 - (1 - lambda)^(exit + 1).

A request runs the dearest entry of an exit that its ceiling allows; with exact K/V only entries that share the ceiling's
widths and skips, since others would compute all of it again. The head of the vocabulary is read once a token in any case;
going deeper again costs refills, which the engine charges. The policy looks at no deadline; admission is the shared one.
"""

from typing import Literal

import numpy as np

from sortserve.engine.policies.admission import settle, turned_away
from sortserve.engine.policies.baselines import chunks, reasons
from sortserve.engine.policies.lookout import Lookout
from sortserve.engine.policies.protocol import Decision, Reason, View
from sortserve.engine.rungs import Floats, Ints

Signal = Literal["maximum", "q-exit"]
SIGNALS: tuple[Signal, ...] = ("maximum", "q-exit")


class Confidence:
    """See the module. `steepness` of the logistic function, whose middle is `threshold`."""

    name = "confidence"
    wants_confidence = (
        True  # of the back end: it costs a softmax and the depth head a row; and to be asked at each step
    )

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
        self._lookout = Lookout()

    def decide(self, view: View) -> Decision:
        """See the class."""
        outlook = self._lookout.look(view)
        known = np.isfinite(view.confidence)
        sure = np.where(known, view.confidence, 0.0)
        exit = self._maximum(view, sure) if self._signal == "maximum" else self._q_exit(view, sure)
        place = np.where(known, _dearest(view, exit), view.ceiling)
        forecast = outlook.foresee(place[None], chunks(view, 1))
        dropped = turned_away(outlook, forecast.late(view)[0], outlook.hopeless(view.ceiling))
        reason = reasons(view, place, Reason.CONFIDENCE)
        return settle(outlook, place, reason, dropped, view.step_tokens, self._lookout.decisions)

    def _maximum(self, view: View, sure: Floats) -> Ints:
        """[n] exits, counted from 0."""
        exits = view.rungs.exits - 1
        part = np.clip((sure - self._threshold) / (1.0 - self._threshold), 0.0, 1.0)
        exit: Ints = np.rint(exits[view.ceiling] - part * (exits[view.ceiling] - exits[view.floor])).astype(np.int64)
        return exit

    def _q_exit(self, view: View, sure: Floats) -> Ints:
        """[n] exits, counted from 0."""
        hazard = 1.0 / (1.0 + np.exp(-self._steepness * (sure - self._threshold)))
        within = 1.0 - (1.0 - hazard[:, None]) ** np.arange(1, view.rungs.num_segments + 1)
        if view.within is not None:
            within = np.where(np.isfinite(view.within), view.within, within)
        within[:, -1] = 1.0  # nothing is deeper than the deepest
        exit: Ints = (within > self._q).argmax(axis=1)
        return exit


def _dearest(view: View, exit: Ints) -> Ints:
    """[n] the dearest place of each request's exit, or of the next deeper exit that has one, within floor and ceiling."""
    rungs, places = view.rungs, np.arange(len(view.rungs.exits))
    differs = (rungs.settings[:, None] != rungs.settings[None]) & rungs.runs[:, None] & rungs.runs[None]
    alike = ~differs.any(axis=2)  # [places, places]
    allowed = places <= view.ceiling[:, None]
    allowed &= ~view.exact[:, None] | alike[view.ceiling]
    deep_enough = allowed & (rungs.exits - 1 >= exit[:, None])
    # of what is deep enough the shallowest exit, and there the dearest place; the ceiling where nothing is
    rank = np.where(deep_enough, rungs.exits * len(places) - places, np.iinfo(np.int64).max)
    place = np.where(deep_enough.any(axis=1), rank.argmin(axis=1), view.ceiling)
    found: Ints = np.clip(place, view.floor, view.ceiling)
    return found
