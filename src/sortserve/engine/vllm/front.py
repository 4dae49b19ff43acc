"""vLLM's asynchronous engine behind our messages: requests in, events out, statistics counted here.

One task a request reads vLLM's outputs and says what they mean. The policy is not here: it sits in vLLM's scheduler,
which tells with every output what it did.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from sortserve.engine.admission import Limits, check_request, resolve_terms
from sortserve.engine.errors import OverloadedError, SortServeError
from sortserve.engine.ladder import Ladder
from sortserve.engine.protocol import (
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    Prediction,
    TokenEvent,
)
from sortserve.engine.vllm.outputs import TOLD, Alternatives, Answer, Output
from sortserve.engine.vllm.translate import sampling_arguments

Tell = Callable[[list[Event]], None]


class Front:
    """Requests of one AsyncLLM. `tell` is called with the events of each output, in order."""

    def __init__(self, llm: AsyncLLM, ladder: Ladder, limits: Limits, tell: Tell, on_dead: Callable[[], None]) -> None:
        self._llm = llm
        self._ladder = ladder
        self._limits = limits
        self._tell = tell
        self._on_dead = on_dead
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, Answer] = {}
        self._generated: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._selected: Counter[tuple[str, str]] = Counter()
        self._switched: Counter[str] = Counter()
        self._prompt_tokens = self._cached_tokens = self._preemptions = self._recomputed = 0

    # ---- requests

    def submit(self, request: GenerateRequest) -> None:
        """Take a request up, or tell why not."""
        try:
            check_request(request, self._limits)
            resolve_terms(request, self._ladder)
            arguments = sampling_arguments(request)
            waiting = sum(not answer.accepted for answer in self._answers.values())
            if waiting >= self._limits.max_waiting:
                self._dropped["queue_full"] += 1
                raise OverloadedError(
                    f"{waiting} requests are waiting, the queue holds {self._limits.max_waiting}", retry_after=1.0
                )
        except SortServeError as error:
            self._tell([FailedEvent.of(request.request_id, error)])
            return
        self._prompt_tokens += len(request.prompt)
        answer = Answer(request, self._ladder.entries[-1].id)
        self._answers[request.request_id] = answer
        params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        self._tasks[request.request_id] = asyncio.create_task(self._serve(answer, params))

    def abort(self, request_id: str) -> None:
        """End a request; it hears so. Nothing if it has ended."""
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def finish(self) -> None:
        """Abort what is left."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until nothing is left."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def forget(self) -> None:
        """Count from nothing again: what ran until now was no client's."""
        for counter in (self._generated, self._dropped, self._selected, self._switched):
            counter.clear()
        self._prompt_tokens = self._cached_tokens = self._preemptions = self._recomputed = 0

    async def _serve(self, answer: Answer, params: SamplingParams) -> None:
        request_id = answer.asked.request_id
        told: Mapping[str, Any] = {}
        try:
            outputs = self._llm.generate({"prompt_token_ids": list(answer.asked.prompt)}, params, request_id)
            async for output in outputs:
                taken = read(output)
                told = taken.told or told
                events = answer.take(taken, time.monotonic())
                self._count(events, told)
                self._tell(events)
        except asyncio.CancelledError:
            ended = FinishedEvent(request_id, "abort", answer.summary(told, time.monotonic()))
            self._tell([ended])  # vLLM aborts a request whose stream is closed
        except EngineDeadError:
            self._on_dead()
        except Exception as error:  # this request only: what vLLM refuses is not ours to know
            self._tell([FailedEvent(request_id, "RequestError", f"vLLM refused the request: {error}")])
        finally:
            self._tasks.pop(request_id, None)
            self._answers.pop(request_id, None)

    # ---- statistics

    def _count(self, events: list[Event], told: Mapping[str, Any]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self._generated[event.submodel] += 1
            elif isinstance(event, FinishedEvent):
                self._cached_tokens += event.summary.cached_tokens
                self._preemptions += event.summary.preemptions
                self._recomputed += event.summary.refilled_tokens
                for before, after, reason in told.get("switches", ()):
                    self._selected[str(after), str(reason)] += 1
                    if before:
                        up = self._ladder.place(str(after)) > self._ladder.place(str(before))
                        self._switched["up" if up else "down"] += 1
            elif isinstance(event, FailedEvent) and "refused" in told:
                self._dropped["overloaded"] += 1

    def stats(self) -> EngineStats:
        """A snapshot. vLLM's own pages and steps are in its own metrics."""
        running = sum(answer.accepted for answer in self._answers.values())
        return EngineStats(
            running=running,
            waiting=len(self._answers) - running,
            preemptions=self._preemptions,
            refilled_tokens=self._recomputed,
            prefix_queries=self._prompt_tokens,
            prefix_hits=self._cached_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=dict(self._generated),
            selected=dict(self._selected),
            switches=dict(self._switched),
            dropped=dict(self._dropped),
        )

    def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """Nothing: the costs are known in vLLM's scheduler, which is another process."""
        return {}


def read(output: RequestOutput) -> Output:
    """What an output of vLLM says, as plain values."""
    [made] = output.outputs
    params = output.kv_transfer_params or {}

    def plain(position: Any) -> Alternatives | None:
        return None if position is None else {token: (each.logprob, each.rank or 0) for token, each in position.items()}

    prompt = output.prompt_logprobs
    return Output(
        tokens=list(made.token_ids),
        logprobs=None if made.logprobs is None else [plain(each) or {} for each in made.logprobs],
        prompt_logprobs=None if prompt is None else [plain(each) for each in prompt],
        finish_reason=made.finish_reason,
        told=params.get(TOLD, {}),
    )
