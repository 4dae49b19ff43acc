"""The scheduler: which rows run in the next step, on which sub-model, and what a finished step means.

There is no prefill or decode phase: every request has tokens known and tokens computed, and catches up. A step is
`plan = schedule(now)`, the runner's work, `events = update(plan, result, now)`. No torch here.
"""

from collections.abc import Callable, Iterable

import numpy as np

from sortserve.engine.admission import Limits, Load, check_request, check_strict, resolve_terms
from sortserve.engine.booking import Books
from sortserve.engine.cost import CostTable, StepCost
from sortserve.engine.deciding import ASK_EVERY, Decider
from sortserve.engine.errors import BudgetInfeasibleError, OverloadedError, RequestError
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.forecast import Forecast, first_place
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Ladder
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.plan import Plan, SequencePlan, StepResult
from sortserve.engine.planner import Planned, Planner, nobody
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Policy, Reason, View
from sortserve.engine.protocol import (
    AcceptedEvent,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    Prediction,
)
from sortserve.engine.request import Request
from sortserve.engine.rungs import Ints, Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.step import fill, in_order, rows_of
from sortserve.engine.table import RequestTable
from sortserve.engine.tally import Tally

FEATURES = frozenset({"refill", "sit_out", "reuse"})
"""What this engine can do; policies read it."""


class Scheduler:
    """Owns all requests. Every accepted one gets exactly one terminal event, from `update`, `abort` or `take_events`."""

    def __init__(
        self,
        ladder: Ladder,
        kv: KVManager,
        policy: Policy,
        limits: Limits,
        *,
        eos_token_ids: Iterable[int] = (),
        max_step_tokens: int = 256,
        max_running: int = 64,
        unasked: int | None = None,
        on_end: Callable[[str], None] | None = None,
        ask_every: int = ASK_EVERY,
    ) -> None:
        """`on_end` is called with the id of every request that ends, however it does."""
        self.ladder = ladder
        self.kv = kv
        self.limits = limits
        self.settings = SettingsTable(ladder)
        self.rungs = Rungs.of(ladder, self.settings)
        self.cost: StepCost | None = None  # None: nothing is predicted
        self.requests: dict[str, Request] = {}
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._unasked = unasked  # the floor of requests that name neither floor nor budget; None: the full model
        self._on_end = on_end
        self._planner = Planner(kv, self.settings)
        self._lengths = AnswerLengths()
        self._tally = Tally()
        self._books = Books(ladder, self._tally, self._lengths, eos_token_ids)
        self._table = RequestTable(self.rungs, kv, self.settings)
        self.decider = Decider(policy, self._table, ask_every)
        self._cutting: dict[str, Request] = {}  # with the budget policy `cut` and a total
        self._repeatable: list[
            tuple[Request, SequencePlan]
        ] = []  # the last step's rows, if the next one may be its like
        self._pending: list[Event] = []

    @property
    def policy(self) -> Policy:
        """What chooses the sub-models."""
        return self.decider.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.decider.policy = policy
        self.decider.note()

    # ---- requests in and out

    def add(self, asked: GenerateRequest) -> None:
        """Accept a request. Raises RequestError or UnavailableError if it cannot be served; then it leaves no trace."""
        check_request(asked, self.limits)
        terms = resolve_terms(asked, self.ladder, self._unasked)
        running = sum(request.running for request in self.requests.values())
        waiting = len(self.requests) - running
        if waiting >= self.limits.max_waiting:
            self._tally.dropped["queue_full"] += 1
            raise OverloadedError(
                f"{waiting} requests are waiting, the queue holds {self.limits.max_waiting}", retry_after=1.0
            )
        try:
            if self.cost is not None:
                check_strict(asked, terms, Load(self.cost, self.rungs, self._max_step_tokens, running))
        except (BudgetInfeasibleError, OverloadedError) as error:
            self._tally.dropped[error.code] += 1
            raise
        assert asked.request_id not in self.requests, "request ids are unique"
        request = Request(
            asked,
            self.kv.new_sequence(len(asked.prompt) + asked.sampling.max_tokens),
            terms.floor,
            terms.ceiling,
            terms.kv_mode,
            terms.seed,
            list(asked.prompt),
            asked.sampling.plain,
            prompt_logprobs=[None] if asked.sampling.prompt_logprobs is not None else [],
        )
        self.requests[asked.request_id] = request
        self._table.add(request)
        self.decider.note()
        if asked.budget is not None and asked.budget.policy == "cut" and asked.budget.total_ms is not None:
            self._cutting[request.id] = request
        self._tally.prompt_tokens += len(asked.prompt)

    def abort(self, request_id: str, now: float) -> FinishedEvent | None:
        """End a request at once; None if it is not there any more. Its pages are free when this returns."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self._pending = [event for event in self._pending if event.request_id != request_id]  # nothing after the end
        return self._finish(request, "abort", now)

    @property
    def has_work(self) -> bool:
        """Whether any request is alive, or something is left to tell."""
        return bool(self.requests or self._pending)

    # ---- planning

    def schedule(self, now: float) -> Plan | None:
        """The next step, or None if nothing can run."""
        if self._cutting:
            self._cut_overdue(now)
        if not self.requests:
            return None
        parts = self._repeated(now)
        if parts is None:
            parts = self._plan_anew(now)
        if not parts:
            return None
        self._tally.steps += 1
        shape = shape_of_parts(self.rungs, parts) if self.cost is not None else None
        return Plan(self._tally.steps, tuple(parts), shape, getattr(self.policy, "wants_confidence", False))

    def _repeated(self, now: float) -> list[SequencePlan] | None:
        """The last step's rows, each a token further, if the policy need not be asked and all of them can go on so; None
        if the step has to be planned anew. What was reserved for it until then is found there."""
        if not self._repeatable or self.decider.due(now):
            return None
        parts = []
        for request, before in self._repeatable:
            part = self._planner.repeat(request, before)
            if part is None:
                part = self._planner.plan(request, before.submodel, self._max_step_tokens * self.rungs.num_layers).part
                if part is None or len(part.tokens) > 1:
                    return None
            parts.append(part)
        self.decider.step_repeated()
        self._repeatable = [(pair[0], part) for pair, part in zip(self._repeatable, parts, strict=True)]
        return parts

    def _plan_anew(self, now: float) -> list[SequencePlan]:
        requests = list(self._table.requests)
        cost = self.cost or CostTable.free(self.rungs)
        view = self._table.view(
            now, cost, self._lengths, self._max_step_tokens, self._max_running, FEATURES, self.decider.steps
        )
        decision = self.decider.decide(view)
        place = decision.place
        if decision.refuse.any():
            place = np.where(decision.refuse, SITS_OUT, place)
            for row in np.flatnonzero(decision.refuse).tolist():
                self._refuse(requests[row])
        runnable = np.where(place >= 0, place, 0)
        have, start, stop = fill(view, place, decision.chunk_tokens)
        wanted = rows_of(view, runnable, have, start, stop) @ self.rungs.layers  # rows x layers
        order = in_order(view, place, start)
        planned = self._plan_rows(requests, view, order, place, decision.reason, wanted, now)
        singles = all(len(part.tokens) == 1 for _, part in planned)
        steady = singles and len(planned) == int((view.running & (place >= 0)).sum())
        if steady and (len(planned) == self._max_running or view.running[place >= 0].all()):
            self._repeatable = planned
        else:
            self._repeatable = []
            if not singles:  # a prompt goes on: who waits for it may change with every chunk
                self.decider.note()
        return [part for _, part in planned]

    def _plan_rows(
        self, requests: list[Request], view: View, order: Ints, place: Ints, reasons: Ints, wanted: Ints, now: float
    ) -> list[tuple[Request, SequencePlan]]:
        """Parts for those that the filling gave rows, in order; what somebody cannot use for want of memory is offered to
        those behind. In the runner's order of rows: exit descending, like widths together."""
        left, spare = self._max_step_tokens * self.rungs.num_layers, 0
        num_running = int(view.running.sum())
        planned: dict[str, tuple[Request, SequencePlan]] = {}
        sitting_out = np.flatnonzero(place < 0).tolist()
        for position, row in enumerate(order.tolist()):
            most = int(wanted[row]) or spare
            request = requests[row]
            was_running = request.running
            if most <= 0 or left <= 0 or (not was_running and num_running >= self._max_running):
                continue
            exit_layers = self.rungs.depth(int(place[row]))  # what was guessed as a resumed row may have to start anew

            def victims(behind: Ints = order[position + 1 :]) -> list[Request]:
                others = [requests[i] for i in (*behind.tolist(), *sitting_out)]
                return [other for other in others if other.id in self.requests and other.id not in planned]

            made = self._plan_request(
                request, int(place[row]), Reason(int(reasons[row])), min(left, max(most, exit_layers)), victims
            )
            if made.part is None or not was_running:
                num_running = sum(other.running for other in self.requests.values())
            if made.part is None:
                spare += int(wanted[row]) if made.memory_short else 0
                continue
            planned[request.id] = request, made.part
            left -= made.cost
            spare = max(0, spare - max(0, made.cost - int(wanted[row])))
            if request.first_row is None:
                self._accept(request, made.part, now)
        return sorted(planned.values(), key=lambda pair: (-pair[1].exit, pair[1].widest))  # stable: requests keep order

    def _plan_request(
        self, request: Request, place: int, reason: Reason, max_cost: int, victims: Callable[[], list[Request]]
    ) -> Planned:
        """The request's part of the step on the chosen place, or where memory is short on the one it runs already, and
        last on its floor. With exact K/V only depth gives way: other widths would start from the first token again, at
        every step if the policy then wants the old ones back."""
        attempts = [(place, reason)]
        if place > request.floor:
            tied = request.kv_mode == "exact" and request.submodel != NEVER_RAN
            same = self.settings.compatible(place) if tied else None
            for fallback in (request.submodel, request.floor):
                if (same is None or fallback in same) and request.floor <= fallback < attempts[-1][0]:
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
            self.decider.note()
        return made

    def _note_change(self, request: Request, place: int, reason: Reason) -> None:
        """Count a change of sub-model with its reason."""
        self._tally.selected[self.ladder.entries[place].id, reason.name.lower()] += 1
        if request.submodel != NEVER_RAN:
            request.switches += 1
            request.last_switch = request.num_output
            self._tally.switched["up" if place > request.submodel else "down"] += 1
        request.submodel = place

    # ---- what is told before a step ran

    def _forecast(self) -> Forecast:
        return Forecast.of(self.requests.values(), self.rungs, self.cost, self._max_step_tokens)

    def _accept(self, request: Request, part: SequencePlan, now: float) -> None:
        """Tell a request that runs for the first time what it starts with. All the K/V it has then were cached."""
        request.first_row = now
        if request.asked.sampling.prompt_logprobs is None:
            request.cached_tokens = part.watermark[0]
            self._tally.prefix_queries += request.num_prompt
            self._tally.prefix_hits += request.cached_tokens
        expected = self._lengths.expected_left(request)
        predicted, met = self._forecast().of_request(request, expected, now)
        self._pending.append(
            AcceptedEvent(
                request.id,
                self.ladder.entries[request.submodel].id,
                predicted,
                met,
                now - request.asked.arrival,
                request.cached_tokens,
            )
        )

    def _cut_overdue(self, now: float) -> None:
        """Budget policy `cut`: stop where one more step, of the shape that runs now, would come too late."""
        forecast = self._forecast()
        for request in list(self._cutting.values()):
            if forecast.too_late(request, now):
                request.cut = True
                if request.first_row is None:
                    submodel = self.ladder.entries[first_place(request)].id
                    self._pending.append(AcceptedEvent(request.id, submodel, None, False))
                self._pending.append(self._finish(request, "length", now))

    def _refuse(self, request: Request) -> None:
        """The policy gives up a strict request that has not run: for now, its client may come back."""
        forecast = self._forecast()
        error = OverloadedError(
            f"the latency budget cannot be kept any more under the present load ({forecast.running.total()} running)",
            retry_after=max(1.0, forecast.step_seconds() * 16),
        )
        self._tally.dropped[error.code] += 1
        self._end(request)
        self._pending.append(FailedEvent.of(request.id, error))

    # ---- what a step gave

    def take_events(self) -> list[Event]:
        """Events that came up while planning."""
        events, self._pending = self._pending, []
        return events

    def update(self, plan: Plan, result: StepResult, now: float) -> list[Event]:
        """Book a finished step; returns the events in order. Rows of requests that ended meanwhile are thrown away."""
        events = self.take_events()
        for part, gave in zip(plan.sequences, result.sequences, strict=True):
            request = self.requests.get(part.request_id)
            if request is None:
                continue
            if part.spans[0].start < part.watermark[0]:
                refilled = sum(span.num_rows for span in part.spans if span.start < part.watermark[0])
                request.refilled_tokens += refilled
                self._tally.refilled_tokens += refilled
            self.kv.advance(request.kv, request.tokens, part.exit, part.spans, states=part.keep_states)
            ending = self._books.book(request, part, gave, now, events)
            if ending == "error":
                assert gave.error is not None
                self._end(request)
                events.append(FailedEvent.of(request.id, RequestError(gave.error, param="response_format")))
            elif ending is not None:
                events.append(self._finish(request, ending, now))
        return events

    def _finish(self, request: Request, reason: FinishReason, now: float) -> FinishedEvent:
        self._end(request)
        return FinishedEvent(request.id, reason, request.summary(self.ladder, now))

    def _end(self, request: Request) -> None:
        del self.requests[request.id]
        self._cutting.pop(request.id, None)
        self._table.remove(request)
        self.decider.note()
        self.kv.free(request.kv)
        request.running = False
        if self._on_end is not None:
            self._on_end(request.id)

    # ---- inspection

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self._tally.stats(self.requests.values(), self.kv)

    def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """What one more request of that many prompt tokens would take now, by sub-model id; nothing if unmeasured."""
        return self._forecast().one_more(self.ladder, max(1, prompt_tokens))

    def check_integrity(self) -> None:
        """Assert the page accounting and the watermarks; see KVManager."""
        self.kv.check_integrity(request.kv for request in self.requests.values())
