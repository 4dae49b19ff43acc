"""From a decision to the parts of a step: the rows of each request that takes part, and the memory for them; and from the
last step's parts to those of its like.

A request that goes on as in the last step, one token further, is the common case by far; its part is laid out ahead, while
the step before it still runs (`lay_out`), and only checked when its turn comes.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sortserve.engine.ladder import Ladder
from sortserve.engine.plan import SequencePlan
from sortserve.engine.planner import Planned, Planner, nobody
from sortserve.engine.policies.protocol import NEVER_RAN, Reason, View
from sortserve.engine.request import Request, owner_of
from sortserve.engine.rungs import Ints, Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.tally import Tally


class Assembly:
    """Makes parts. `requests` is the scheduler's own mapping: who is in it is alive."""

    def __init__(
        self,
        requests: Mapping[str, Request],
        planner: Planner,
        settings: SettingsTable,
        rungs: Rungs,
        ladder: Ladder,
        tally: Tally,
        max_running: int,
    ) -> None:
        self._memory_short = False  # whether somebody could not run as decided in the step that is planned
        self._before: dict[str, SequencePlan] = {}  # the last step's parts
        self._repeatable: list[tuple[Request, int]] = []  # its rows and their places, if the next step may be its like
        self._requests = requests
        self._planner = planner
        self._settings = settings
        self._rungs = rungs
        self._ids = [entry.id for entry in ladder.entries]
        self._tally = tally
        self._max_running = max_running
        self._ahead: dict[str, SequencePlan] = {}

    # ---- rows that go on as before

    def lay_out(self, parts: Sequence[SequencePlan]) -> None:
        """Parts of the step after the one that these make, for single rows; their K/V are booked already, the token that
        the step gives is not known yet."""
        self._ahead = {}
        for part in parts:
            request = owner_of(part, self._requests)
            if request is not None and request.plain and part.sample is not None:
                made = self._planner.repeat(request, part, known=len(request.tokens) + 1)
                if made is not None:
                    self._ahead[part.request_id] = made

    def repeated(self, num_placed: int) -> list[SequencePlan] | None:
        """The last step's rows, each a token further, if all of them can go on so and nobody else could join them; None if
        the step has to be planned anew. What was reserved for it until then is found there. `num_placed`: requests that
        the policy gave a place."""
        rows = self._repeatable = [pair for pair in self._repeatable if not pair[0].left]
        if not rows or len(rows) < min(num_placed, self._max_running):
            return None
        parts = []
        for request, place in rows:
            part = self._again(request, place)
            if part is None:
                return None
            parts.append(part)
        return parts

    @property
    def may_repeat(self) -> bool:
        """Whether the next step may be like the one that was planned last."""
        return bool(self._repeatable)

    def repeat_no_more(self) -> None:
        """The policy changed its mind: the next step is another one."""
        self._repeatable = []

    def runs(self, parts: Sequence[SequencePlan]) -> None:
        """These are the step that runs next."""
        self._before = {part.request_id: part for part in parts}

    def _again(self, request: Request, place: int) -> SequencePlan | None:
        """The request's part if it goes on at `place` as in the last step, else None."""
        part, before = self._ahead.get(request.id), self._before.get(request.id)
        if part is not None and part.submodel == place and self._planner.still_fits(request, part):
            return part
        if before is None or before.submodel != place or request.submodel != place:
            return None
        return self._planner.repeat(request, before, known=len(request.tokens))

    # ---- rows by a decision

    def rows(
        self,
        requests: Sequence[Request],
        view: View,
        order: Ints,
        place: Ints,
        reasons: Ints,
        wanted: Ints,
    ) -> list[SequencePlan]:
        """Parts for those that the filling gave rows (`wanted`, rows x layers), in order; what somebody cannot use for want
        of memory is offered to those behind. In the runner's order of rows: exit descending, like widths together."""
        parts = self._filled(requests, view, order, place, reasons, wanted)
        self._repeatable = []
        # else a prompt goes on, or memory was short: who waits for it may change with every chunk
        if not self._memory_short and all(part.stop - part.start == 1 for part in parts):
            self._repeatable = [(self._requests[part.request_id], part.submodel) for part in parts]
        return parts

    def _filled(
        self, requests: Sequence[Request], view: View, order: Ints, place: Ints, reasons: Ints, wanted: Ints
    ) -> list[SequencePlan]:
        left, spare = view.step_tokens * self._rungs.num_layers, 0
        num_running = int(view.running.sum())
        planned: dict[str, SequencePlan] = {}
        depths = self._rungs.runs @ self._rungs.layers
        sitting_out = np.flatnonzero(place < 0).tolist()
        self._memory_short = False
        needed, places, causes = wanted.tolist(), place.tolist(), reasons.tolist()
        for position, row in enumerate(order.tolist()):
            most = needed[row] or spare
            request = requests[row]
            was_running = request.running
            if most <= 0 or left <= 0 or (not was_running and num_running >= self._max_running):
                continue
            depth = int(depths[places[row]])  # what was guessed as a resumed row may have to start anew
            part = self._again(request, places[row]) if depth <= left else None
            if part is not None:
                planned[request.id] = part
                left -= depth
                continue

            def victims(behind: Ints = order[position + 1 :]) -> list[Request]:
                others = [requests[i] for i in (*behind.tolist(), *sitting_out)]
                return [other for other in others if other.id in self._requests and other.id not in planned]

            made = self._row(request, places[row], Reason(causes[row]), min(left, max(most, depth)), victims)
            if made.part is None or not was_running:
                num_running = sum(other.running for other in self._requests.values())
            if made.part is None:
                spare += needed[row] if made.memory_short else 0
                continue
            planned[request.id] = made.part
            left -= made.cost
            spare = max(0, spare - max(0, made.cost - needed[row]))
        return sorted(planned.values(), key=lambda part: (-part.exit, part.widest))  # stable: requests keep order

    def _row(
        self, request: Request, place: int, reason: Reason, max_cost: int, victims: Callable[[], list[Request]]
    ) -> Planned:
        """The request's part of the step on the chosen place, or where memory is short on the one it runs already, and
        last on its floor. None of them is deeper: a cheaper place may be (narrow, of more layers), and would need more
        memory and rows than there are. With exact K/V only depth gives way: other widths would start from the first token
        again, at every step if the policy then wants the old ones back."""
        attempts = [(place, reason)]
        if place > request.floor:
            tied = request.kv_mode == "exact" and request.submodel != NEVER_RAN
            same = self._settings.compatible(place) if tied else None
            exits = self._rungs.exits
            for fallback in (request.submodel, request.floor):
                lower = request.floor <= fallback < attempts[-1][0] and exits[fallback] <= exits[attempts[-1][0]]
                if lower and (same is None or fallback in same):
                    attempts.append((fallback, Reason.MEMORY))
        made = Planned(None)
        for number, (at, why) in enumerate(attempts):
            made = self._planner.plan(request, at, max_cost, victims if number == len(attempts) - 1 else nobody)
            if made.part is not None:
                request.running = True
                if at != request.submodel:
                    self._note_change(request, at, why)
            if not made.memory_short:
                break
            self._memory_short = True
        return made

    def _note_change(self, request: Request, place: int, reason: Reason) -> None:
        """Count a change of sub-model with its reason."""
        self._tally.selected[self._ids[place], reason.name.lower()] += 1
        if request.submodel != NEVER_RAN:
            request.switches += 1
            request.last_switch = request.num_output
            self._tally.switched["up" if place > request.submodel else "down"] += 1
        request.submodel = place
