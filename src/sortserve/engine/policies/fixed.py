"""`fixed`: every request runs one place of the ladder, first come first served: what engines without sub-models do."""

import numpy as np

from sortserve.engine.policies.protocol import Decision, Reason, View


class FixedPolicy:
    """One place, within each request's floor and ceiling. Refuses nobody."""

    name = "fixed"

    def __init__(self, place: int) -> None:
        self._place = place

    def decide(self, view: View) -> Decision:
        """The fixed place, clamped."""
        place = np.clip(self._place, view.floor, view.ceiling)
        reason = np.where(view.floor == view.ceiling, int(Reason.PINNED), int(Reason.FIXED))
        return Decision(place, reason, np.zeros(len(view), np.bool_), view.step_tokens)
