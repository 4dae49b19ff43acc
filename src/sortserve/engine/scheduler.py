"""The scheduler: which rows run in the next step, on which sub-model, and what a finished step means.

There is no prefill or decode phase: every request has tokens known and tokens computed, and catches up. A step is
`plan = schedule(now)`, the runner's work, `events = update(plan, result, now)`. No torch here.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from sortserve.engine.admission import Limits, check_request, check_strict, resolve_terms
from sortserve.engine.errors import BudgetInfeasibleError, OverloadedError, RequestError
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Ladder
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.plan import Plan, SequencePlan, SequenceResult, StepResult
from sortserve.engine.planner import Planned, Planner
from sortserve.engine.policy import Choice, Policy, View
from sortserve.engine.predictor import Correction, StepTimes
from sortserve.engine.protocol import (
    AcceptedEvent,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    PromptLogprobsEvent,
    TokenEvent,
)
from sortserve.engine.request import NEVER_RAN, Request
from sortserve.engine.settings import SettingsTable
from sortserve.engine.tally import Tally

CUT_RESERVE_SECONDS = 0.002
"""Kept back by the `cut` policy for a step that takes a little longer than predicted, and for the way to the socket."""


class Scheduler:
    """Owns all requests. Every accepted one gets exactly one terminal event, from `update` or `abort`."""

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
    ) -> None:
        """`on_end` is called with the id of every request that ends, however it does."""
        self.ladder = ladder
        self.kv = kv
        self.policy = policy
        self.limits = limits
        self.settings = SettingsTable(ladder)
        self.times: StepTimes | None = None
        self.correction = Correction()
        self.requests: dict[str, Request] = {}
        self._eos = frozenset(eos_token_ids)
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._unasked = unasked  # the floor of requests that name neither floor nor budget; None: the full model
        self._on_end = on_end
        self._planner = Planner(kv, self.settings)
        self._lengths = AnswerLengths()
        self._tally = Tally()
        self._pending: list[Event] = []

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
            check_strict(asked, terms, self.times, self.correction.factor, self._max_step_tokens, running)
        except (BudgetInfeasibleError, OverloadedError) as error:
            self._tally.dropped[error.code] += 1
            raise
        assert asked.request_id not in self.requests, "request ids are unique"
        self.requests[asked.request_id] = Request(
            asked,
            self.kv.new_sequence(len(asked.prompt) + asked.sampling.max_tokens),
            terms.floor,
            terms.ceiling,
            terms.kv_mode,
            terms.seed,
            list(asked.prompt),
            prompt_logprobs=[None] if asked.sampling.prompt_logprobs is not None else [],
        )
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
        """Whether any request is alive."""
        return bool(self.requests)

    # ---- planning

    def schedule(self, now: float) -> Plan | None:
        """The next step, or None if nothing can run."""
        self._cut_overdue(now)
        requests = self._in_order()
        choices = self._choose(requests, now)
        cost_left = self._max_step_tokens * self.ladder.shape.num_layers
        planned: dict[str, SequencePlan] = {}
        num_running = sum(request.running for request in requests)
        for position, (request, choice) in enumerate(zip(requests, choices, strict=True)):
            if choice.place is None or cost_left <= 0 or (not request.running and num_running >= self._max_running):
                continue
            was_running = request.running
            made = self._plan_request(request, choice, cost_left, requests[position + 1 :])
            if made.part is None or not was_running:
                num_running = sum(other.running for other in requests)
            if made.part is not None:
                planned[request.id] = made.part
                cost_left -= made.cost
                self._accept(request, made.part, now)
        if not planned:
            return None
        self._tally.steps += 1
        ordered = sorted(planned.values(), key=lambda part: (-part.exit, part.widest))  # stable: requests keep order
        return Plan(self._tally.steps, tuple(ordered))

    def _in_order(self) -> list[Request]:
        """Earliest deadline first, then arrival; rows that need one token only go before prompts and refills."""

        def key(request: Request) -> tuple[bool, float, float]:
            behind = len(request.tokens) - request.kv.watermark[0] > 1 or not request.running
            return behind, request.due(self._lengths.expected_left(request)), request.asked.arrival

        return sorted(self.requests.values(), key=key)

    def _choose(self, requests: list[Request], now: float) -> list[Choice]:
        view = View(
            now,
            requests,
            [self._lengths.expected_left(request) for request in requests],
            self.ladder,
            self.settings,
            self.times,
            self.correction.factor,
            self._max_step_tokens,
        )
        choices = self.policy.decide(view)
        for request, choice in zip(requests, choices, strict=True):
            assert choice.place is None or request.floor <= choice.place <= request.ceiling, "a policy broke a floor"
        return choices

    def _plan_request(self, request: Request, choice: Choice, max_cost: int, others: list[Request]) -> Planned:
        """The request's part of the step on the chosen place, or where memory is short on the one it runs already, and
        last on its floor. With exact K/V only depth gives way: other widths would start from the first token again, at
        every step if the policy then wants the old ones back."""
        assert choice.place is not None
        attempts = [choice]
        tied = request.kv_mode == "exact" and request.submodel != NEVER_RAN
        same = self.settings.compatible(choice.place) if tied else None
        for fallback in (request.submodel, request.floor):
            if same is not None and fallback not in same:
                continue
            if request.floor <= fallback < attempts[-1].place:  # type: ignore[operator]
                attempts.append(Choice(fallback, "memory"))
        made = Planned(None)
        for attempt in attempts:
            assert attempt.place is not None
            victims = others if attempt is attempts[-1] else []
            made = self._planner.plan(request, attempt.place, max_cost, victims)
            if made.part is not None:
                request.running = True
                self._note_choice(request, attempt)
            if not made.memory_short:
                break
        return made

    def _note_choice(self, request: Request, choice: Choice) -> None:
        """Count a change of sub-model with its reason."""
        assert choice.place is not None
        if choice.place == request.submodel:
            return
        self._tally.selected[self.ladder.entries[choice.place].id, choice.reason] += 1
        if request.submodel != NEVER_RAN:
            request.switches += 1
            request.last_switch = request.num_output
            self._tally.switched["up" if choice.place > request.submodel else "down"] += 1
        request.submodel = choice.place

    def _accept(self, request: Request, part: SequencePlan, now: float) -> None:
        """Tell a request that runs for the first time what it starts with. All the K/V it has then were cached."""
        if request.first_row is not None:
            return
        request.first_row = now
        if request.asked.sampling.prompt_logprobs is None:
            request.cached_tokens = part.watermark[0]
            self._tally.prefix_queries += request.num_prompt
            self._tally.prefix_hits += request.cached_tokens
        predicted, met = None, True
        if request.asked.budget is not None and self.times is not None:
            count = sum(other.running for other in self.requests.values())
            expected = self._lengths.expected_left(request)
            step = self.times.step([(request.submodel, count)]) * self.correction.factor
            first = self.times.prefill(request.submodel, request.num_prompt, self._max_step_tokens)
            first_at = now + max(first * self.correction.factor, step)
            last_at = first_at + step * (expected - 1)
            predicted = last_at - request.asked.arrival
            met = request.asked.budget.met(request.asked.arrival, first_at, last_at, expected)
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
        running = Counter(request.submodel for request in self.requests.values() if request.running)
        for request in list(self.requests.values()):
            budget = request.asked.budget
            if budget is None or budget.policy != "cut" or budget.total_ms is None:
                continue
            shape = running if request.running else running + Counter([request.floor])
            step = 0.0 if self.times is None else self.times.step(shape.items()) * self.correction.factor
            if now + step + CUT_RESERVE_SECONDS > request.asked.arrival + budget.total_ms / 1e3:
                request.cut = True
                self._accept_unrun(request)
                self._pending.append(self._finish(request, "length", now))

    def _accept_unrun(self, request: Request) -> None:
        if request.first_row is None:
            place = request.floor if request.submodel == NEVER_RAN else request.submodel
            self._pending.append(AcceptedEvent(request.id, self.ladder.entries[place].id, None, False))

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
            if request is not None:
                refilled = sum(span.num_rows for span in part.spans if span.start < part.watermark[0])
                request.refilled_tokens += refilled
                self._tally.refilled_tokens += refilled
                self.kv.advance(request.kv, request.tokens, part.exit, part.spans, states=part.keep_states)
                events.extend(self._book(request, part, gave, now))
        return events

    def _book(self, request: Request, part: SequencePlan, gave: SequenceResult, now: float) -> list[Event]:
        """Append what was sampled, and end the request if that was its last token."""
        events: list[Event] = []
        if gave.prompt_logprobs:
            known = len(request.prompt_logprobs) - part.start - 1  # these ran before a preemption or refill
            request.prompt_logprobs.extend(gave.prompt_logprobs[known:])
            if known < len(gave.prompt_logprobs) and len(request.prompt_logprobs) == request.num_prompt:
                events.append(PromptLogprobsEvent(request.id, tuple(request.prompt_logprobs)))
        sampling = request.asked.sampling
        if part.stop == request.num_prompt == 1 and request.num_output == 0 and sampling.prompt_logprobs is not None:
            events.append(PromptLogprobsEvent(request.id, (None,)))
        if gave.error is not None:
            self._end(request)
            events.append(FailedEvent.of(request.id, RequestError(gave.error, param="response_format")))
            return events
        if gave.token is None:
            if part.stop == request.num_prompt and sampling.max_tokens == 0:
                events.append(self._finish(request, "length", now))
            return events
        request.tokens.append(gave.token)
        request.made[part.submodel] += 1
        request.first_token = now if request.first_token is None else request.first_token
        request.last_token = now
        submodel = self.ladder.entries[part.submodel].id
        self._tally.generated[submodel] += 1
        events.append(TokenEvent(request.id, gave.token, submodel, now, gave.logprob, request.refilled_tokens))
        stopped = (gave.token in self._eos and not sampling.ignore_eos) or gave.token in sampling.stop_token_ids
        if stopped or request.tokens_left == 0:
            self._lengths.observe(request.num_output)
            events.append(self._finish(request, "stop" if stopped else "length", now))
        return events

    def _finish(self, request: Request, reason: FinishReason, now: float) -> FinishedEvent:
        self._end(request)
        return FinishedEvent(request.id, reason, request.summary(self.ladder, now))

    def _end(self, request: Request) -> None:
        del self.requests[request.id]
        self.kv.free(request.kv)
        request.running = False
        if self._on_end is not None:
            self._on_end(request.id)

    # ---- inspection

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self._tally.stats(self.requests.values(), self.kv)

    def check_integrity(self) -> None:
        """Assert the page accounting and the watermarks; see KVManager."""
        self.kv.check_integrity(request.kv for request in self.requests.values())
