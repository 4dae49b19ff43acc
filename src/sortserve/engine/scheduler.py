"""The scheduler: which rows run in the next step, on which sub-model, and what a finished step means.

There is no prefill or decode phase: every request has tokens known and tokens computed, and catches up. A step is
`plan = schedule(now)`, the runner's work, `events = update(plan, result, now)`. `ahead` is `schedule` while the step before
still runs. No torch here.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from sortserve.engine import ahead
from sortserve.engine.admission import Limits, Load, check_request, check_strict, resolve_terms
from sortserve.engine.assembly import Assembly
from sortserve.engine.booking import Books
from sortserve.engine.cost import CostTable, StepCost
from sortserve.engine.deciding import ASK_EVERY, Decider
from sortserve.engine.errors import BudgetInfeasibleError, OverloadedError, RequestError
from sortserve.engine.forecast import Forecast, first_place
from sortserve.engine.foretelling import Foreteller
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Ladder
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.plan import PENDING, Plan, SequencePlan, StepResult
from sortserve.engine.planner import Planner
from sortserve.engine.policies.protocol import NEVER_RAN, Policy, View
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
from sortserve.engine.request import Request, owner_of
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
        self._foreteller = Foreteller()
        self._cutting: dict[str, Request] = {}  # with the budget policy `cut` and a total
        self._assembly = Assembly(
            self.requests, self._planner, self.settings, self.rungs, ladder, self._tally, max_running
        )
        self._before: dict[str, SequencePlan] = {}  # the last step's parts
        self._repeatable: list[tuple[Request, int]] = []  # its rows and their places, if the next step may be its like
        self._booked = 0  # number of the last step that `beside` was called for
        self._refused: list[Request] = []
        self._ended = False  # whether somebody did since `_repeatable` was looked through
        self._pending: list[Event] = []

    @property
    def policy(self) -> Policy:
        """What chooses the sub-models."""
        return self.decider.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.decider.policy = policy
        self.decider.note(urgent=True)

    # ---- requests in and out

    def add(self, asked: GenerateRequest) -> None:
        """Accept a request. Raises RequestError or UnavailableError if it cannot be served; then it leaves no trace."""
        check_request(asked, self.limits)
        terms = resolve_terms(asked, self.ladder, self._unasked)
        running = sum(request.running for request in self.requests.values())
        waiting = len(self._table) - running
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
        self.decider.note(urgent=True)
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
        for request in self._overdue(now):
            self._cut(request, now)
        return self._next(now)

    def ahead(self, plan: Plan, now: float) -> Plan | None:
        """The step after `plan`, which runs until `now` and was given to `beside`; to be launched behind it, then `update`
        books `plan`. None: it cannot be planned before. Whoever turns out to have ended runs a row in vain."""
        assert plan.step == self._booked
        if self.decider.wants_confidence or not ahead.can_follow(plan, self.requests) or self._overdue(now):
            return None
        for request in ahead.expect_tokens(plan, self.requests):
            self._leave(request)
        return self._next(now)

    def _next(self, now: float) -> Plan | None:
        self._refuse_decided()
        if not len(self._table):
            return None
        parts = [] if self.decider.must_ask else self._repeated() or self._plan_anew(now)
        if not parts and self.decider.is_urgent:  # also if the last answer was given just now: nobody else runs
            self._ask(now)
            self._refuse_decided()
            parts = self._repeated() or self._plan_anew(now)
        if not parts:
            self.decider.note(urgent=True)
            return None
        self._before = {part.request_id: part for part in parts}
        self._tally.steps += 1
        self.decider.step_ran()
        return Plan(self._tally.steps, tuple(parts), self.decider.wants_confidence)

    def beside(self, plan: Plan, now: float) -> None:
        """What need not wait for the end of a running plan: book its K/V, as if they were there already (nobody reads them
        before the next step), ask the policy if its answer is out of date, and lay out the next step's single rows. May
        be called from another thread while the runner works; `update` calls it if nobody did."""
        if plan.step <= self._booked:
            return
        self._booked = plan.step
        for part in plan.sequences:
            request = owner_of(part, self.requests)
            if request is None:
                continue
            assert part.tokens[part.stop - 1] != PENDING, "the step before is to be booked first"
            refilled = part.num_refilled
            request.refilled_tokens += refilled
            self._tally.refilled_tokens += refilled
            self._planner.state_worth.note(part)
            self.kv.advance(request.kv, request.tokens, part.exit, part.spans, states=part.keep_states)
        if len(self._table) and self.decider.may_ask(now):
            self._ask(now, {part.request_id for part in plan.sequences if part.sample is not None})
        self._assembly.lay_out(plan.sequences)

    def _ask(self, now: float, coming: Collection[str] = ()) -> None:
        """A new answer of the policy; `coming`: who gets a token until it counts. Refusals are told with the next plan."""
        requests = list(self._table.requests)
        step_seconds = getattr(self.cost, "last_seconds", 0.0)
        changed, refused = self.decider.ask(lambda: self._view(now, coming), step_seconds)
        self._refused += [requests[row] for row in refused.tolist()]
        if changed:
            self._repeatable = []

    def _view(self, now: float, coming: Collection[str] = ()) -> View:
        return self._table.view(
            now,
            self.cost or CostTable.free(self.rungs),
            self._lengths,
            self._max_step_tokens,
            self._max_running,
            FEATURES,
            max(1, self.decider.steps),
            coming,
            self._foreteller.traffic,
        )

    def _repeated(self) -> list[SequencePlan] | None:
        """The last step's rows, each a token further, if all of them can go on so and nobody else could join them; None if
        the step has to be planned anew. What was reserved for it until then is found there."""
        rows, count = self._repeatable, len(self._table)
        if self._ended:
            rows = self._repeatable = [pair for pair in rows if not pair[0].left]
            self._ended = False
        sitting_out = int((self._table.decided[:count] < 0).sum())
        if not rows or (len(rows) + sitting_out < count and len(rows) < self._max_running):
            return None
        parts = []
        for request, place in rows:
            part = self._assembly.again(request, self._before.get(request.id), place)
            if part is None:
                return None
            parts.append(part)
        return parts

    def _plan_anew(self, now: float) -> list[SequencePlan]:
        requests, view = list(self._table.requests), self._view(now)
        place, reasons = self._table.decided[: len(view)].copy(), self._table.reasons[: len(view)]
        runnable = np.where(place >= 0, place, 0)
        have, start, stop = fill(view, place, self.decider.chunk_tokens)
        wanted = rows_of(view, runnable, have, start, stop) @ self.rungs.layers  # rows x layers
        order = in_order(view, place, start)
        parts = self._assembly.rows(requests, self._before, view, order, place, reasons, wanted)
        begun = [part for part in parts if self.requests[part.request_id].first_row is None]
        if begun:
            self._accept(begun, requests, view, place, now)
        singles = all(part.spans[-1].stop - part.spans[0].start == 1 for part in parts)
        self._repeatable = []
        if singles and not self._assembly.memory_short:
            self._repeatable = [(self.requests[part.request_id], part.submodel) for part in parts]
        else:  # a prompt goes on, or memory was short: who waits for it may change with every chunk
            self.decider.note()
        return parts

    # ---- what is told before a step ran

    def _forecast(self) -> Forecast:
        return Forecast.of(self.requests.values(), self.rungs, self.cost, self._max_step_tokens)

    def _accept(
        self, begun: Sequence[SequencePlan], requests: Sequence[Request], view: View, place: Ints, now: float
    ) -> None:
        """Tell requests that run for the first time what they start with. All the K/V they have then were cached."""
        first, last = self._foreteller.foretell(view, place, self.decider.chunk_tokens)
        rows = {request.id: row for row, request in enumerate(requests)}
        for part in begun:
            request, row = self.requests[part.request_id], rows[part.request_id]
            asked = request.asked
            request.first_row = now
            if asked.sampling.prompt_logprobs is None:
                request.cached_tokens = part.watermark[0]
                self._tally.prefix_queries += request.num_prompt
                self._tally.prefix_hits += request.cached_tokens
            self._foreteller.traffic.note(now, request.num_prompt - request.cached_tokens)
            predicted, met = None, True
            if asked.budget is not None and self.cost is not None:
                request.foretold = float(last[row])
                expected = request.num_output + int(view.expected_left[row])
                coming = float(first[row]), request.foretold
                predicted, met = self._foreteller.told(asked.budget, asked.arrival, now, coming, expected)
            self._pending.append(
                AcceptedEvent(
                    request.id,
                    self.ladder.entries[request.submodel].id,
                    predicted,
                    met,
                    now - asked.arrival,
                    request.cached_tokens,
                )
            )

    def _overdue(self, now: float) -> list[Request]:
        """Budget policy `cut`: those for whom one more step, of the shape that runs now, would come too late."""
        if not self._cutting:
            return []
        forecast = self._forecast()
        return [request for request in self._cutting.values() if forecast.too_late(request, now)]

    def _cut(self, request: Request, now: float) -> None:
        request.cut = True
        if request.first_row is None:
            submodel = self.ladder.entries[first_place(request)].id
            self._pending.append(AcceptedEvent(request.id, submodel, None, False))
        self._pending.append(self._finish(request, "length", now))

    def _refuse_decided(self) -> None:
        """Strict requests that the policy gave up, unless they are gone: for now, their clients may come back."""
        refused, self._refused = self._refused, []
        for request in refused:
            if request.id in self.requests and request.submodel == NEVER_RAN:
                self._refuse(request)

    def _refuse(self, request: Request) -> None:
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
        self.beside(plan, now)
        events = self.take_events()
        for part, gave in zip(plan.sequences, result.sequences, strict=True):
            request = owner_of(part, self.requests)
            if request is None:
                continue
            ending = self._books.book(request, part, gave, now, events)
            if ending == "error":
                assert gave.error is not None
                self._end(request)
                events.append(FailedEvent.of(request.id, RequestError(gave.error, param="response_format")))
            elif ending is not None:
                events.append(self._finish(request, ending, now))
        return events

    def _finish(self, request: Request, reason: FinishReason, now: float) -> FinishedEvent:
        if request.foretold is not None and request.first_row is not None and reason != "abort" and not request.cut:
            self._foreteller.ended(request.foretold, now - request.first_row)
        self._end(request)
        return FinishedEvent(request.id, reason, request.summary(self.ladder, now))

    def _end(self, request: Request) -> None:
        del self.requests[request.id]
        if not request.left:
            self._leave(request)
        if self._on_end is not None:
            self._on_end(request.id)

    def _leave(self, request: Request) -> None:
        """Nothing of it will be planned any more. What still runs of it may write to the pages that it gives back: whoever
        gets them writes later, and reads nothing that it did not write."""
        request.left = True
        request.running = False
        self._cutting.pop(request.id, None)
        self._table.remove(request)
        self._ended = True
        self.decider.note()
        self.kv.free(request.kv)

    # ---- inspection

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self._tally.stats(self._table.requests, self.kv)

    def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """What one more request of that many prompt tokens would take now, by sub-model id; nothing if unmeasured."""
        return self._forecast().one_more(self.ladder, max(1, prompt_tokens))

    def check_integrity(self) -> None:
        """Assert the page accounting and the watermarks; see KVManager."""
        self.kv.check_integrity(request.kv for request in self.requests.values())
