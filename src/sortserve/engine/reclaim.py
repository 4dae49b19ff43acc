"""Taking memory back when it runs short, in this order: cached prefixes, exit states, deep pages, whole requests."""

from dataclasses import dataclass

from sortserve.engine.kv import KVManager
from sortserve.engine.policies.protocol import NEVER_RAN
from sortserve.engine.request import Request
from sortserve.engine.settings import SettingsTable


@dataclass(frozen=True, slots=True)
class Room:
    """Room was made. `states`: whether there is room for the request's exit states too."""

    states: bool


class Reclaimer:
    """Makes room for one request at the cost of others that come after it in the scheduler's order."""

    def __init__(self, kv: KVManager, settings: SettingsTable) -> None:
        self._kv = kv
        self._settings = settings

    def make_room(self, request: Request, exit: int, stop: int, *, states: bool, victims: list[Request]) -> Room | None:
        """Room for `request` to own tokens [0, stop) up to `exit`, or None: not now.

        `victims` are not part of the step that is being planned; an empty list spares everybody.
        """

        def fits(with_states: bool) -> bool:
            return self._kv.make_room(self._kv.pages_to_reserve(request.kv, exit, stop, states=with_states))

        if fits(states):
            return Room(states)
        if not victims and not states:
            return None
        for other in reversed(victims):
            if other.kv.states:
                self._kv.drop_states(other.kv)
                self._kv.events["states_dropped"] += 1
                if fits(states):
                    return Room(states)
        if states and fits(False):
            return Room(False)
        for other in reversed(victims):
            self._release_deep(other)
            if fits(False):
                return Room(False)
        for other in reversed(victims):
            if other.kv.cells[0]:  # it runs, or it waits on adopted blocks
                self._preempt(other)
                if fits(False):
                    return Room(False)
        # the request's own cost of being shared: nothing is left but itself
        self._kv.drop_states(request.kv)
        return Room(False) if fits(False) else None

    def _release_deep(self, other: Request) -> None:
        """Deep pages that a request does not need where it may run: it is demotable to its floor."""
        lowest = self._settings.exits[other.floor]
        if other.submodel == NEVER_RAN or not other.running or lowest >= self._kv.geometry.num_segments:
            return
        if any(other.kv.cells[lowest:]):
            self._kv.release_deep(other.kv, lowest)

    def _preempt(self, other: Request) -> None:
        """Take all pages of a request; it waits again, and replays its recorded settings when it comes back."""
        self._kv.free(other.kv)
        if other.running:
            other.running = False
            other.preemptions += 1
            self._kv.events["preempted"] += 1
