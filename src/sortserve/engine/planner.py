"""One request's part of a step on one place of the ladder: its rows, and the memory they need."""

from dataclasses import dataclass

import numpy as np

from sortserve.engine.kv import KVManager
from sortserve.engine.plan import SequencePlan, Span
from sortserve.engine.reclaim import Reclaimer
from sortserve.engine.request import Request
from sortserve.engine.settings import SettingsTable


@dataclass(frozen=True, slots=True)
class Planned:
    """The part of the step and its cost in rows x layers. `part` is None where nothing can run: because memory is short,
    or because the step has no room left for a single row."""

    part: SequencePlan | None
    cost: int = 0
    memory_short: bool = False


class Planner:
    """Turns (request, place) into rows with pages reserved for them."""

    def __init__(self, kv: KVManager, settings: SettingsTable) -> None:
        self.reclaimer = Reclaimer(kv, settings)
        self._kv = kv
        self._settings = settings

    def plan(self, request: Request, place: int, max_cost: int, victims: list[Request]) -> Planned:
        """Rows that bring `request` closer to its last token on `place`, for at most `max_cost`. `victims` may lose
        memory for it; none are touched while the pool suffices."""
        exit, target = self._settings.exits[place], self._settings.targets[place]
        kv, known = request.kv, len(request.tokens)
        if request.kv_mode == "exact":
            self._kv.change_settings(kv, target, exit, known)
        if request.asked.sampling.prompt_logprobs is None:  # else every row of the prompt must run
            self._kv.adopt(kv, request.tokens, exit, target)
        spans, cost = kv.spans(exit, known, target, max_cost)
        if not spans:
            return Planned(None)
        states = request.keeps_states and exit < self._kv.geometry.num_segments
        # a refill gets all its pages before it starts, so that it cannot starve half-way
        reserve_stop = known if kv.refill_rows(exit) > 0 else spans[-1].stop
        if not self._kv.reserve(kv, exit, reserve_stop, states=states):
            room = self.reclaimer.make_room(request, exit, reserve_stop, states=states, victims=victims)
            if room is None:
                return Planned(None, memory_short=True)
            states = room.states
            if not self._kv.reserve(kv, exit, reserve_stop, states=states):
                return Planned(None, memory_short=True)
            # what was reclaimed may have been the request's own states
            spans, cost = kv.spans(exit, known, target, max_cost)
            if not spans:
                return Planned(None)
        return Planned(self._part(request, place, spans, states=states), cost)

    def _part(self, request: Request, place: int, spans: list[Span], *, states: bool) -> SequencePlan:
        kv, sampling = request.kv, request.asked.sampling
        start, stop, exit = spans[0].start, spans[-1].stop, self._settings.exits[place]
        successors = request.asked.prompt[start + 1 : stop + 1] if sampling.prompt_logprobs is not None else ()
        return SequencePlan(
            request_id=request.id,
            submodel=place,
            exit=exit,
            spans=tuple(spans),
            tokens=np.asarray(request.tokens[start:stop], np.int32),
            watermark=tuple(kv.watermark[:exit]),
            pages=kv.table[: len(kv.cells[0])],
            state_pages={where: cell.pages for where, cell in kv.states.items()},
            keep_states=states,
            sample=request.sample_spec() if stop == len(request.tokens) and sampling.max_tokens > 0 else None,
            prompt_logprobs=sampling.prompt_logprobs if successors else None,
            successors=successors,
        )
