"""Whether exit states are worth keeping: by how many of the tokens that ran shallow were deepened later, of late.

A kept state saves a refill the layers below its exit. It costs about one layer: the last one before the exit, in which rows
that nobody samples else only write their K/V; and pages, and a copy. Kept by all requests at the floor of the bundled
model (2 layers), under a load in which one token in forty was refilled, states made steps 1.6 times as long.
"""

from sortserve.engine.plan import SequencePlan

_WINDOW = 8192.0
"""Tokens over which it is counted; older ones count half each time that so many more ran."""
_PRIOR = 256.0
"""Tokens taken to have been deepened before any was seen: until it is known that few are, states are kept."""


class StateWorth:
    """Of one engine. Deterministic."""

    def __init__(self, num_segments: int) -> None:
        self._num_segments = num_segments
        self._shallow, self._deepened = 0.0, _PRIOR

    def note(self, part: SequencePlan) -> None:
        """This runs: tokens to less than full depth for the first time, or others deeper."""
        refilled = part.num_refilled
        self._deepened += refilled
        if part.exit < self._num_segments:
            self._shallow += part.stop - part.spans[0].start - refilled
        if self._shallow > _WINDOW:
            self._shallow, self._deepened = self._shallow / 2, self._deepened / 2

    def pays(self, depth: int) -> bool:
        """Whether a state after `depth` layers saves more than the layer that it costs, on average."""
        return self._deepened * depth >= self._shallow
