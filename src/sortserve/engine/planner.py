"""One request's part of a step on one place of the ladder: its rows, and the memory they need."""

from collections.abc import Callable
from dataclasses import dataclass

from sortserve.engine.kv import KVManager
from sortserve.engine.plan import SampleSpec, SequencePlan, Span
from sortserve.engine.reclaim import Reclaimer
from sortserve.engine.request import Request
from sortserve.engine.settings import SettingsTable
from sortserve.engine.state_worth import StateWorth


@dataclass(frozen=True, slots=True)
class Planned:
    """The part of the step and its cost in rows x layers. `part` is None where nothing can run: because memory is short,
    or because the step has no room left for a single row."""

    part: SequencePlan | None
    cost: int = 0
    memory_short: bool = False


def nobody() -> list[Request]:
    """The victims of a request that must get by with what is free or cached."""
    return []


class Planner:
    """Turns (request, place) into rows with pages reserved for them."""

    def __init__(self, kv: KVManager, settings: SettingsTable) -> None:
        self.reclaimer = Reclaimer(kv, settings)
        self.state_worth = StateWorth(kv.geometry.num_segments)
        self._kv = kv
        self._settings = settings

    def plan(
        self, request: Request, place: int, max_cost: int, victims: Callable[[], list[Request]] = nobody
    ) -> Planned:
        """Rows that bring `request` closer to its last token on `place`, for at most `max_cost`. `victims` may lose
        memory for it; none are touched, nor looked for, while the pool suffices."""
        exit, target = self._settings.exits[place], self._settings.targets[place]
        kv, known = request.kv, len(request.tokens)
        if request.kv_mode == "exact" and request.settled != place:
            self._kv.change_settings(kv, target, exit, known)
            request.settled = place
        # all rows of the prompt must run where its log-probabilities are wanted; the last known token always runs
        if kv.watermark[exit - 1] < known - 1 and request.asked.sampling.prompt_logprobs is None:
            self._kv.adopt(kv, request.tokens, exit, target)
        spans, cost = kv.spans(exit, known, target, max_cost)
        if not spans:
            return Planned(None)
        states = self._keeps_states(request, exit)
        # a refill gets all its pages before it starts, so that it cannot starve half-way
        reserve_stop = known if kv.refill_rows(exit) > 0 else spans[-1].stop
        if not self._kv.reserve(kv, exit, reserve_stop, states=states):
            room = self.reclaimer.make_room(request, exit, reserve_stop, states=states, victims=victims())
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

    def _keeps_states(self, request: Request, exit: int) -> bool:
        geometry = self._kv.geometry
        return request.keeps_states and exit < geometry.num_segments and self.state_worth.pays(geometry.bounds[exit])

    def _part(self, request: Request, place: int, spans: list[Span], *, states: bool) -> SequencePlan:
        kv, sampling = request.kv, request.asked.sampling
        start, stop, exit = spans[0].start, spans[-1].stop, self._settings.exits[place]
        successors = request.asked.prompt[start + 1 : stop + 1] if sampling.prompt_logprobs is not None else ()
        return SequencePlan(
            request_id=request.id,
            submodel=place,
            exit=exit,
            spans=tuple(spans),
            tokens=request.tokens,
            watermark=tuple(kv.watermark[:exit]),
            pages=kv.table[: len(kv.cells[0])].copy(),  # the table moves on while the step runs
            state_pages={where: cell.pages for where, cell in kv.states.items()},
            keep_states=states,
            sample=request.sample_spec() if stop == len(request.tokens) and sampling.max_tokens > 0 else None,
            prompt_logprobs=sampling.prompt_logprobs if successors else None,
            successors=successors,
        )

    def repeat(self, request: Request, before: SequencePlan, known: int) -> SequencePlan | None:
        """What `plan` gives a request that goes on as `before`, one token further; None where that takes more than moving
        it on and a page: a chunk, settings to replay, somebody else's memory. A tenth of its time. `known`: tokens of the
        request; one more than it has where the last one is still to come."""
        kv, start, exit = request.kv, before.spans[-1].stop, before.exit
        # a block that becomes whole may give way to a shared one like it, so the pages are those of the table then
        published = start % self._kv.geometry.block_tokens == 0 or start - before.spans[0].start > 1
        watermark = kv.watermark
        if start != known - 1 or not watermark[0] == watermark[exit - 1] == start or not request.running:
            return None
        if kv.settings[0, start] >= 0 or before.prompt_logprobs is not None:
            return None
        states = before.keep_states
        if states != self._keeps_states(request, exit):
            return None  # memory was short for states, or they paid: it may be otherwise now
        block, within = divmod(start, self._kv.geometry.block_tokens)
        pages = before.pages
        if within == 0 and not self._kv.reserve(kv, exit, start + 1, states=states):
            return None
        if published:
            pages = kv.table[: block + 1].copy()
        state_pages = before.state_pages
        if states:
            cell = kv.states.get((block, exit))
            if cell is None:
                return None
            state_pages = {(block, exit): cell.pages}
        elif state_pages:
            state_pages = {}
        asked = request.asked
        return SequencePlan(
            before.request_id,
            before.submodel,
            exit,
            (Span(start, start + 1, 0, exit, self._settings.targets[before.submodel]),),
            request.tokens,
            (start,) * exit,
            pages,
            state_pages,
            states,
            SampleSpec(asked.sampling, request.seed, start + 1, asked.prompt, ())
            if request.plain
            else request.sample_spec(),
        )

    def still_fits(self, request: Request, part: SequencePlan) -> bool:
        """Whether a part that was laid out ahead is what `repeat` would give now."""
        start, exit, kv = part.spans[0].start, part.exit, request.kv
        return (
            start == len(request.tokens) - 1
            and request.running
            and request.submodel == part.submodel
            and kv.watermark[0] == kv.watermark[exit - 1] == start
            and (not part.keep_states or (start // self._kv.geometry.block_tokens, exit) in kv.states)
        )
