"""The scheduler: which rows run in the next step, on which sub-model, and what a finished step means.

There is no prefill or decode phase: every request has tokens known and tokens computed, and catches up. A step is
`plan = schedule(now)`, the runner's work, `events = update(plan, result, now)`. No torch here.
"""

from collections import Counter, deque
from collections.abc import Iterable

import numpy as np

from sortserve.engine.admission import Limits, check_request, check_strict, resolve_terms
from sortserve.engine.errors import BudgetInfeasibleError, OverloadedError
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Ladder
from sortserve.engine.plan import Plan, SequencePlan, SequenceResult, StepResult
from sortserve.engine.policy import Choice, Policy, View
from sortserve.engine.predictor import Correction, StepTimes
from sortserve.engine.protocol import (
    AcceptedEvent,
    EngineStats,
    Event,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    PromptLogprobsEvent,
    TokenEvent,
)
from sortserve.engine.reclaim import Reclaimer
from sortserve.engine.request import NEVER_RAN, Request
from sortserve.engine.settings import SettingsTable

RENEW_TOKENS = 16
"""The expected length of an answer is at least what it has plus so many tokens."""


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
    ) -> None:
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
        self._reclaimer = Reclaimer(kv, self.settings)
        self._lengths: deque[int] = deque(maxlen=256)
        self._steps = 0
        self._pending: list[Event] = []
        self._generated: Counter[str] = Counter()
        self._selected: Counter[tuple[str, str]] = Counter()
        self._switched: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()

    # ---- requests in and out

    def add(self, asked: GenerateRequest) -> None:
        """Accept a request. Raises RequestError or UnavailableError if it cannot be served; then it leaves no trace."""
        check_request(asked, self.limits)
        terms = resolve_terms(asked, self.ladder)
        running = sum(request.running for request in self.requests.values())
        waiting = len(self.requests) - running
        if waiting >= self.limits.max_waiting:
            self._dropped["queue_full"] += 1
            raise OverloadedError(
                f"{waiting} requests are waiting, the queue holds {self.limits.max_waiting}", retry_after=1.0
            )
        try:
            check_strict(asked, terms, self.times, self.correction.factor, self._max_step_tokens, running)
        except (BudgetInfeasibleError, OverloadedError) as error:
            self._dropped[error.code] += 1
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
        self._totals["prompt_tokens"] += len(asked.prompt)

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
            others = [other for other in requests[position + 1 :] if other.id not in planned]
            was_running = request.running
            part, cost = self._plan_request(request, choice, cost_left, others)
            num_running = sum(other.running for other in requests) if part is None or not was_running else num_running
            if part is not None:
                planned[request.id] = part
                cost_left -= cost
                self._accept(request, part, now)
        if not planned:
            return None
        self._steps += 1
        ordered = sorted(planned.values(), key=lambda part: (-part.exit, part.widest))  # stable: requests keep order
        return Plan(self._steps, tuple(ordered))

    def _in_order(self) -> list[Request]:
        """Earliest deadline first, then arrival; rows that need one token only go before prompts and refills."""
        expected = self._expected_length()

        def key(request: Request) -> tuple[bool, float, float]:
            behind = len(request.tokens) - request.kv.watermark[0] > 1 or not request.running
            return behind, request.due(self._expected_left(request, expected)), request.asked.arrival

        return sorted(self.requests.values(), key=key)

    def _expected_length(self) -> float:
        """90th percentile of finished answers' lengths; inf before any is known."""
        return float(np.quantile(self._lengths, 0.9)) if self._lengths else float("inf")

    def _expected_left(self, request: Request, expected_length: float) -> int:
        if request.asked.sampling.ignore_eos:
            return max(1, request.tokens_left)
        left = max(expected_length - request.num_output, RENEW_TOKENS)
        return int(max(1, min(request.tokens_left, left)))

    def _choose(self, requests: list[Request], now: float) -> list[Choice]:
        expected = self._expected_length()
        view = View(
            now,
            requests,
            [self._expected_left(request, expected) for request in requests],
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

    def _plan_request(
        self, request: Request, choice: Choice, max_cost: int, others: list[Request]
    ) -> tuple[SequencePlan | None, int]:
        """The request's part of the step on the chosen place, or where memory is short on the one it runs already, and
        last on its floor; and its cost in rows x layers. With exact K/V only depth gives way: other widths would start
        from the first token again, at every step if the policy then wants the old ones back."""
        assert choice.place is not None
        attempts = [choice]
        tied = request.kv_mode == "exact" and request.submodel != NEVER_RAN
        same = self.settings.compatible(choice.place) if tied else None
        for fallback in (request.submodel, request.floor):
            if same is not None and fallback not in same:
                continue
            if request.floor <= fallback < attempts[-1].place:  # type: ignore[operator]
                attempts.append(Choice(fallback, "memory"))
        for attempt, is_last in zip(attempts, [False] * (len(attempts) - 1) + [True], strict=True):
            assert attempt.place is not None
            part, cost, short = self._plan_on(request, attempt.place, max_cost, others if is_last else [])
            if part is not None:
                self._note_choice(request, attempt)
                return part, cost
            if not short:
                break
        return None, 0

    def _plan_on(
        self, request: Request, place: int, max_cost: int, victims: list[Request]
    ) -> tuple[SequencePlan | None, int, bool]:
        """The part of the step on `place`, its cost, and whether memory was short."""
        exit, target = self.settings.exits[place], self.settings.targets[place]
        kv, known = request.kv, len(request.tokens)
        if request.kv_mode == "exact":
            self.kv.change_settings(kv, target, exit, known)
        reads_prompt = request.asked.sampling.prompt_logprobs is not None
        if not reads_prompt:
            self.kv.adopt(kv, request.tokens, exit, target)
        watermark = tuple(kv.watermark[:exit])
        spans, cost = kv.spans(exit, known, target, max_cost)
        if not spans:
            return None, 0, False
        states = request.keeps_states and exit < self.kv.geometry.num_segments
        # a refill gets all its pages before it starts, so that it cannot starve half-way
        reserve_stop = known if kv.refill_rows(exit) > 0 else spans[-1].stop
        if not self.kv.reserve(kv, exit, reserve_stop, states=states):
            room = self._reclaimer.make_room(request, exit, reserve_stop, states=states, victims=victims)
            if room is None:
                return None, 0, True
            states = room.states
            if not self.kv.reserve(kv, exit, reserve_stop, states=states):
                return None, 0, True
            # what was reclaimed may have been the request's own states
            watermark = tuple(kv.watermark[:exit])
            spans, cost = kv.spans(exit, known, target, max_cost)
            if not spans:
                return None, 0, False
        request.running = True
        caught_up = spans[-1].stop == known
        wants_token = caught_up and request.asked.sampling.max_tokens > 0
        part = SequencePlan(
            request.id,
            place,
            exit,
            tuple(spans),
            np.asarray(request.tokens[spans[0].start : spans[-1].stop], np.int32),
            watermark,
            kv.table[: len(kv.cells[0])],
            {place: cell.pages for place, cell in kv.states.items()},
            states,
            request.sample_spec() if wants_token else None,
            *self._wanted_logprobs(request, spans[0].start, spans[-1].stop),
        )
        return part, cost, False

    def _wanted_logprobs(self, request: Request, start: int, stop: int) -> tuple[int | None, tuple[int, ...]]:
        """Alternatives to report, and the prompt tokens that rows [start, stop) predict."""
        successors = request.asked.prompt[start + 1 : stop + 1]
        wanted = request.asked.sampling.prompt_logprobs
        return (wanted, successors) if wanted is not None and successors else (None, ())

    def _note_choice(self, request: Request, choice: Choice) -> None:
        """Count a change of sub-model with its reason."""
        assert choice.place is not None
        if choice.place == request.submodel:
            return
        self._selected[self.ladder.entries[choice.place].id, choice.reason] += 1
        if request.submodel != NEVER_RAN:
            request.switches += 1
            request.last_switch = request.num_output
            self._switched["up" if choice.place > request.submodel else "down"] += 1
        request.submodel = choice.place

    def _accept(self, request: Request, part: SequencePlan, now: float) -> None:
        """Tell a request that runs for the first time what it starts with. All the K/V it has then were cached."""
        if request.first_row is not None:
            return
        request.first_row = now
        if request.asked.sampling.prompt_logprobs is None:
            request.cached_tokens = part.watermark[0]
            self._totals["prefix_queries"] += request.num_prompt
            self._totals["prefix_hits"] += request.cached_tokens
        predicted, met = None, True
        if request.asked.budget is not None and self.times is not None:
            count = sum(other.running for other in self.requests.values())
            expected = self._expected_left(request, self._expected_length())
            step = self.times.step([(request.submodel, count)]) * self.correction.factor
            first = self.times.prefill(request.submodel, request.num_prompt, self._max_step_tokens)
            first_at = now + max(first * self.correction.factor, step)
            last_at = first_at + step * (expected - 1)
            predicted = last_at - request.asked.arrival
            met = request.asked.budget.met(request.asked.arrival, first_at, last_at, expected)
        self._pending.append(AcceptedEvent(request.id, self.ladder.entries[request.submodel].id, predicted, met))

    def _cut_overdue(self, now: float) -> None:
        """Budget policy `cut`: stop where one more step, of the shape that runs now, would come too late."""
        running = Counter(request.submodel for request in self.requests.values() if request.running)
        for request in list(self.requests.values()):
            budget = request.asked.budget
            if budget is None or budget.policy != "cut" or budget.total_ms is None:
                continue
            shape = running if request.running else running + Counter([request.floor])
            step = 0.0 if self.times is None else self.times.step(shape.items()) * self.correction.factor
            if now + step > request.asked.arrival + budget.total_ms / 1e3:
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
                self._totals["refilled_tokens"] += refilled
                self.kv.advance(request.kv, request.tokens, part.exit, part.spans, states=part.keep_states)
                events.extend(self._book(request, part, gave, now))
        return events

    def _book(self, request: Request, part: SequencePlan, gave: SequenceResult, now: float) -> list[Event]:
        """Append what was sampled, and end the request if that was its last token."""
        events: list[Event] = []
        if gave.prompt_logprobs:
            known = (
                len(request.prompt_logprobs) - part.start - 1
            )  # some rows ran before, ahead of a preemption or refill
            request.prompt_logprobs.extend(gave.prompt_logprobs[known:])
            if known < len(gave.prompt_logprobs) and len(request.prompt_logprobs) == request.num_prompt:
                events.append(PromptLogprobsEvent(request.id, tuple(request.prompt_logprobs)))
        sampling = request.asked.sampling
        if part.stop == request.num_prompt == 1 and request.num_output == 0 and sampling.prompt_logprobs is not None:
            events.append(PromptLogprobsEvent(request.id, (None,)))
        if gave.token is None:
            if part.stop == request.num_prompt and sampling.max_tokens == 0:
                events.append(self._finish(request, "length", now))
            return events
        request.tokens.append(gave.token)
        request.made[part.submodel] += 1
        request.first_token = now if request.first_token is None else request.first_token
        request.last_token = now
        submodel = self.ladder.entries[part.submodel].id
        self._generated[submodel] += 1
        events.append(TokenEvent(request.id, gave.token, submodel, now, gave.logprob))
        stopped = (gave.token in self._eos and not sampling.ignore_eos) or gave.token in sampling.stop_token_ids
        if stopped or request.tokens_left == 0:
            self._lengths.append(request.num_output)
            events.append(self._finish(request, "stop" if stopped else "length", now))
        return events

    def _finish(self, request: Request, reason: FinishReason, now: float) -> FinishedEvent:
        del self.requests[request.id]
        self.kv.free(request.kv)
        request.running = False
        return FinishedEvent(request.id, reason, request.summary(self.ladder, now))

    # ---- inspection

    def stats(self) -> EngineStats:
        """A snapshot."""
        running = sum(request.running for request in self.requests.values())
        pool, cached = self.kv.pool, self.kv.prefix.idle_pages
        return EngineStats(
            running=running,
            waiting=len(self.requests) - running,
            kv_pages_total=pool.num_pages,
            kv_pages_used=pool.num_pages - pool.num_free - cached,
            kv_pages_cached=cached,
            steps=self._steps,
            preemptions=self.kv.events["preempted"],
            refilled_tokens=self._totals["refilled_tokens"],
            prefix_queries=self._totals["prefix_queries"],
            prefix_hits=self._totals["prefix_hits"],
            prefix_refused_width=self.kv.events["width_mismatch_refused"],
            prompt_tokens=self._totals["prompt_tokens"],
            generated_tokens=dict(self._generated),
            selected=dict(self._selected),
            switches=dict(self._switched),
            dropped=dict(self._dropped),
        )

    def check_integrity(self) -> None:
        """Assert the page accounting and the watermarks; see KVManager."""
        self.kv.check_integrity(request.kv for request in self.requests.values())
