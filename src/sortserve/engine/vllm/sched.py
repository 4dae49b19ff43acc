"""vLLM's schedulers with sub-models: a mix-in that decides before, and tells after, what the stock one does.

Before a step: the decider is asked, and each request gets its place of the ladder. A request that goes shallower keeps
its K/V; one that goes where its K/V do not reach is preempted and computed again by the stock code, prompt and output.
After it: a side dict on SchedulerOutput tells the runner every scheduled request's place. What made each token goes to
the front end with the tokens.

An exception in here ends the engine, so what clients sent is clamped, never refused.
"""

import time
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from sortserve.engine.policies.protocol import NEVER_RAN, Reason
from sortserve.engine.vllm.compat import check_start
from sortserve.engine.vllm.configuration import Configuration
from sortserve.engine.vllm.deciding import Answer, Setup
from sortserve.engine.vllm.measuring import StepClock
from sortserve.engine.vllm.reporting import Reporter
from sortserve.engine.vllm.side import places_of, set_places
from sortserve.engine.vllm.tracking import Tracked, keeps_kv, read_request, salt_of, salts, standing


class SubmodelMixin:
    """Stands before vLLM's Scheduler or AsyncScheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_start(self.vllm_config)  # type: ignore[attr-defined]
        self._own = Configuration.of_vllm(self.vllm_config)  # type: ignore[attr-defined]
        self._tracked: dict[str, Tracked] = {}
        self._gone: list[str] = []  # freed by vLLM; their last output may still be told
        self._ended: list[tuple[int, EngineCoreOutput]] = []  # (client, last output) of those refused or cut
        self._salts = salts(self._own.ladder)
        self._step_limit: int = self.max_num_scheduled_tokens
        self._decider = self._own.make_decider()(
            Setup(
                self._own.ladder,
                self._own.settings,
                self._own.decider_options,
                max_running=self.max_num_running_reqs,  # type: ignore[attr-defined]
                step_tokens=self._step_limit,
                max_model_len=self.max_model_len,  # type: ignore[attr-defined]
                block_tokens=self.block_size,  # type: ignore[attr-defined]
                kv_blocks=self.kv_cache_config.num_blocks,  # type: ignore[attr-defined]
            )
        )
        self._clock = StepClock()
        self._reporter = Reporter(self._own.stats_address)

    # ---- arrivals and ends

    def add_request(self, request: Request) -> None:
        """vLLM's, with what our front end sent along."""
        if request.request_id not in self.requests:  # type: ignore[attr-defined]
            params = request.sampling_params
            tracked = read_request(
                None if params is None else params.extra_args,
                self._own.ladder,
                request.arrival_time,
                (time.time(), time.monotonic()),
                request.cache_salt,
            )
            self._tracked[request.request_id] = tracked
            if request.request_id in self._gone:
                self._gone.remove(request.request_id)
            self._go_to(request, tracked, tracked.ceiling, Reason.BEST)
        super().add_request(request)  # type: ignore[misc]

    def _free_blocks(self, request: Request) -> None:
        self._gone.append(request.request_id)
        super()._free_blocks(request)  # type: ignore[misc]

    # ---- a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's, after the decider's answer was carried out."""
        now = time.monotonic()
        self._forget_gone()
        answer = self._decider.decide(self._standings(), now)
        self._carry_out(answer, now)
        output: SchedulerOutput = super().schedule(throttle_prefills)  # type: ignore[misc]
        places = {}
        for request_id, tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked[request_id]
            if tracked.first_scheduled is None:  # what counts as computed before its first rows was found
                tracked.first_scheduled = now
                tracked.cached = self.requests[request_id].num_computed_tokens - tokens  # type: ignore[attr-defined]
            tracked.preemptions = self.requests[request_id].num_preemptions - tracked.promotions  # type: ignore[attr-defined]
            places[request_id] = self._begin(tracked)
        set_places(output, places)
        if self.use_v2_model_runner:  # type: ignore[attr-defined] # whose row order follows this dict's
            exits = self._own.settings.exits
            ordered = sorted(output.num_scheduled_tokens.items(), key=lambda item: -exits[places[item[0]]])
            output.num_scheduled_tokens = dict(ordered)
        self._clock.scheduled(output, places, self.requests, time.monotonic())  # type: ignore[attr-defined]
        return output

    def _begin(self, tracked: Tracked) -> int:
        """The request takes part in a step; the place it runs."""
        if tracked.place != tracked.wanted:
            if tracked.place != NEVER_RAN:
                tracked.switches += 1
                self._reporter.switched(self._own.ladder, tracked.place, tracked.wanted)
            tracked.place = tracked.wanted
            tracked.tokens_since_switch = 0
            self._reporter.selected(self._own.ladder.entries[tracked.place].id, tracked.reason)
        tracked.used.add(tracked.place)
        return tracked.place

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, with each request's sub-models told along with its tokens."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        now = time.monotonic()
        places = places_of(scheduler_output) or {}
        for group in outputs.values():
            for output in group.outputs:
                self._tell(output, places.get(output.request_id), now)
        for client, output in self._ended:
            group = outputs.setdefault(client, EngineCoreOutputs())
            group.outputs = [*group.outputs, output]
        self._ended = []
        goes_on = self.has_unfinished_requests()  # type: ignore[attr-defined]
        step = self._clock.finished(scheduler_output, now, goes_on=goes_on)
        if step is not None:
            self._decider.measured(step)
        self._reporter.report(self, self._decider, now, goes_on=goes_on)
        return outputs

    def _tell(self, output: EngineCoreOutput, place: int | None, now: float) -> None:
        tracked = self._tracked.get(output.request_id)
        if tracked is None:
            return
        if output.new_token_ids and place is not None:
            submodel_id = self._own.ladder.entries[place].id
            tracked.count(submodel_id, len(output.new_token_ids))
            self._reporter.generated(submodel_id, len(output.new_token_ids))
            tracked.first_token = now if tracked.first_token is None else tracked.first_token
            tracked.last_token = now
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and not tracked.cut:
            self._decider.ended(output.request_id, tracked.num_output, now)
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), "sortserve": self._told(tracked, output)}

    def _told(self, tracked: Tracked, output: EngineCoreOutput) -> dict[str, Any]:
        return {
            "submodels": [list(run) for run in tracked.runs],
            "reason": Reason(tracked.reason).name.lower(),
            "switches": tracked.switches,
            "preemptions": tracked.preemptions,
            "recomputed_tokens": tracked.recomputed_tokens,
            "foretold": tracked.foretold,
            "queue": None if tracked.first_scheduled is None else tracked.first_scheduled - tracked.arrival,
            "refused": tracked.refused,
            "cut": tracked.cut,
        }

    # ---- deciding

    def _standings(self) -> list[Any]:
        """All requests alive, vLLM's running ones first."""
        found = []
        for request_id, request in self.requests.items():  # type: ignore[attr-defined]
            tracked = self._tracked[request_id]
            if request.is_finished():
                continue
            running = request.status == RequestStatus.RUNNING
            if not running and request.num_computed_tokens == 0:
                tracked.used.clear()  # preempted, or not begun: the next place makes all of its K/V
            found.append(standing(request_id, tracked, request, running))
        return found

    def _carry_out(self, answer: Answer, now: float) -> None:
        running = []
        for request_id in list(self.requests):  # type: ignore[attr-defined]
            request, tracked = self.requests[request_id], self._tracked[request_id]  # type: ignore[attr-defined]
            if request.is_finished():
                continue
            if request_id in answer.cut or (request_id in answer.refuse and tracked.place == NEVER_RAN):
                self._end(request, tracked, cut=request_id in answer.cut)
                continue
            if request.status == RequestStatus.RUNNING:
                running.append(request)
            if tracked.place == NEVER_RAN:
                tracked.foretold = answer.foretold.get(request_id)
            wanted = answer.place.get(request_id, tracked.wanted)
            wanted = min(max(wanted, tracked.floor), tracked.ceiling)
            reason = answer.reason.get(request_id, tracked.reason)
            if wanted != tracked.wanted:
                self._switch(request, tracked, wanted, reason, now)
            else:
                self._go_to(request, tracked, wanted, reason)
        self._limit_prompts(answer.chunk_tokens, running)
        self._put_in_order(answer.order)

    def _put_in_order(self, order: Sequence[str]) -> None:
        """Who decodes comes first, then prompts that have begun, then those that wait, each in the decider's order. vLLM
        takes them from the front as far as a step's rows go, and memory back from the end of those that run. With priorities
        of vLLM's own these say it."""
        waiting = self.waiting  # type: ignore[attr-defined]
        if not order or not isinstance(waiting, FCFSRequestQueue):
            return
        turn = {request_id: number for number, request_id in enumerate(order)}

        def key(request: Request) -> tuple[bool, int]:
            return request.is_prefill_chunk, turn.get(request.request_id, len(turn))

        self.running.sort(key=key)  # type: ignore[attr-defined]
        ordered = sorted(waiting, key=lambda request: key(request)[1])
        waiting.clear()
        waiting.extend(ordered)

    def _switch(self, request: Request, tracked: Tracked, wanted: int, reason: int, now: float) -> None:
        if request.status == RequestStatus.RUNNING and not keeps_kv(tracked, wanted, self._own.settings):
            tracked.promotions += 1
            tracked.recomputed_tokens += request.num_computed_tokens
            self._reporter.recomputed(request.num_computed_tokens)
            self.running.remove(request)  # type: ignore[attr-defined]
            self._preempt_request(request, now)  # type: ignore[attr-defined]
            # V1's runner takes it for a request that resumes only if it did not run in the step before
            self.prev_step_scheduled_req_ids.discard(request.request_id)  # type: ignore[attr-defined]
            tracked.used.clear()
        elif request.status != RequestStatus.RUNNING and request.num_computed_tokens:
            return  # it waits with K/V that came from elsewhere; asked again when it runs
        self._go_to(request, tracked, wanted, reason)

    def _go_to(self, request: Request, tracked: Tracked, wanted: int, reason: int) -> None:
        """The request's next step runs `wanted`; its blocks are hashed anew if they are no longer to be shared alike."""
        tracked.wanted, tracked.reason = wanted, int(reason)
        salt = salt_of(tracked, request.request_id, self._salts, self._own.settings)
        if request.cache_salt != salt:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()

    def _end(self, request: Request, tracked: Tracked, *, cut: bool) -> None:
        """Refuse a request that never ran, or end one with what it has."""
        tracked.cut, tracked.refused = cut, not cut
        self._reporter.dropped("cut" if cut else "refused")
        status = RequestStatus.FINISHED_LENGTH_CAPPED if cut else RequestStatus.FINISHED_ABORTED
        self.finish_requests(request.request_id, status)  # type: ignore[attr-defined]
        output = EngineCoreOutput(
            request.request_id, [], finish_reason=request.get_finished_reason(), events=request.take_events()
        )
        self._tell(output, None, time.monotonic())
        self._ended.append((request.client_index, output))

    def _limit_prompts(self, chunk_tokens: int | None, running: list[Request]) -> None:
        """Rows of the step: one for each request that decodes, and so many for prompts."""
        self.max_num_scheduled_tokens = self._step_limit
        if chunk_tokens is not None:
            decoding = sum(not request.is_prefill_chunk for request in running)
            self.max_num_scheduled_tokens = max(1, min(self._step_limit, decoding + chunk_tokens))

    def _forget_gone(self) -> None:
        for request_id in self._gone:
            self._tracked.pop(request_id, None)
        self._gone = []

    def shutdown(self) -> None:
        """vLLM's; the reports end."""
        self._reporter.close()
        super().shutdown()  # type: ignore[misc]


class SubmodelScheduler(SubmodelMixin, Scheduler):
    """Where vLLM schedules one step after the other."""


class AsyncSubmodelScheduler(SubmodelMixin, AsyncScheduler):
    """Where vLLM schedules a step while its predecessor runs."""
