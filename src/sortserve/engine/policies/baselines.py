"""Policies to compare with: `reject-only`, `admission-only`, `global-cap`. Prediction and admission are those of `slack`."""

import numpy as np

from sortserve.engine.policies.admission import settle, turned_away
from sortserve.engine.policies.lookout import Lookout
from sortserve.engine.policies.protocol import NEVER_RAN, Decision, Reason, View
from sortserve.engine.rungs import Floats, Ints


def reasons(view: View, place: Ints, otherwise: Reason) -> Ints:
    """[n] PINNED or BEST where a request runs its ceiling, else `otherwise`."""
    best = np.where(view.floor == view.ceiling, int(Reason.PINNED), int(Reason.BEST))
    return np.where(place == view.ceiling, best, int(otherwise))


def chunks(view: View, count: int) -> Floats:
    """[count] a full step for each candidate."""
    return np.full(count, float(view.step_tokens))


class RejectOnly:
    """The full model for all; who is predicted to miss is turned away: what engines with one model can do."""

    name = "reject-only"

    def __init__(self) -> None:
        self._lookout = Lookout()

    def decide(self, view: View) -> Decision:
        """See the class."""
        outlook = self._lookout.look(view)
        forecast = outlook.foresee(view.ceiling[None], chunks(view, 1))
        dropped = turned_away(outlook, forecast.late(view)[0], outlook.hopeless(view.ceiling))
        reason = reasons(view, view.ceiling, Reason.FIXED)
        return settle(outlook, view.ceiling, reason, dropped, view.step_tokens, self._lookout.decisions)


class AdmissionOnly:
    """Chosen once: who starts now gets the highest cap under which the fewest requests are late; then it stays."""

    name = "admission-only"

    def __init__(self, margin: float = 1.2) -> None:
        self._margin = margin
        self._lookout = Lookout()

    def decide(self, view: View) -> Decision:
        """See the class."""
        outlook = self._lookout.look(view)
        caps = np.arange(len(view.rungs.exits))[:, None]
        bounded = np.clip(caps, view.floor, view.ceiling)
        place = np.where(view.place == NEVER_RAN, bounded, np.clip(view.place, view.floor, view.ceiling))
        forecast = outlook.foresee(place, chunks(view, len(caps)))
        late = (forecast.late(view, self._margin) & view.budgeted).sum(1)
        chosen = int(len(caps) - 1 - np.argmin(late[::-1]))
        dropped = turned_away(outlook, forecast.late(view)[chosen], outlook.hopeless(view.floor))
        reason = reasons(view, place[chosen], Reason.ADMISSION)
        return settle(outlook, place[chosen], reason, dropped, view.step_tokens, self._lookout.decisions)


class GlobalCap:
    """One cap for all rows, as MorphServe has one model for all: lowered at once to where the fewest are late, raised by
    one place after `hold` steps in which nobody would be late above, with a larger margin."""

    name = "global-cap"

    def __init__(self, margin: float = 1.2, raise_margin: float = 1.5, hold: int = 16) -> None:
        self._margin, self._raise_margin, self._hold = margin, raise_margin, hold
        self._cap: int | None = None
        self._calm = 0  # steps
        self._lookout = Lookout()

    def decide(self, view: View) -> Decision:
        """See the class."""
        outlook = self._lookout.look(view)
        full = view.rungs.full
        cap = full if self._cap is None else self._cap
        place = np.clip(np.arange(full + 1)[:, None], view.floor, view.ceiling)
        forecast = outlook.foresee(place, chunks(view, full + 1))
        late = (forecast.late(view, self._margin) & view.budgeted).sum(1)
        fewest = int(late[: cap + 1].min())
        lowered = int(np.flatnonzero(late[: cap + 1] == fewest)[-1])
        if lowered < cap:
            cap, self._calm = lowered, 0
        elif cap < full:
            above = (forecast.late(view, self._raise_margin)[cap + 1] & view.budgeted).sum()
            self._calm = 0 if above > fewest else self._calm + 1
            if self._calm >= self._hold:
                cap, self._calm = cap + 1, 0
        self._cap = cap
        dropped = turned_away(outlook, forecast.late(view)[cap], outlook.hopeless(view.floor))
        reason = reasons(view, place[cap], Reason.OTHERS)
        return settle(outlook, place[cap], reason, dropped, view.step_tokens, self._lookout.decisions)
