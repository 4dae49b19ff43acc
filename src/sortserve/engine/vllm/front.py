"""vLLM's asynchronous engine behind our messages: requests in, events out.

One task a request reads vLLM's outputs and says what they mean. The policy is not here: it sits in vLLM's scheduler,
which tells with every output what it did.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from sortserve.engine.admission import Limits, Terms, check_request, resolve_terms
from sortserve.engine.errors import EngineFailedError, OverloadedError, RequestError, SortServeError
from sortserve.engine.protocol import (
    EngineInfo,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    Prediction,
    TokenEvent,
)
from sortserve.engine.vllm.outlook import Outlook
from sortserve.engine.vllm.outputs import RETRY_SECONDS, TOLD, Alternatives, Answer, Output
from sortserve.engine.vllm.translate import extra_args, lark, sampling_arguments

Tell = Callable[[list[Event]], None]


class Front:
    """Requests of one AsyncLLM. `tell` is called with the events of each output, in order; `on_dead` when vLLM's engine
    core has ended. `unasked`: place of the floor of requests that ask for nothing; None: the full model."""

    def __init__(
        self,
        llm: AsyncLLM,
        info: EngineInfo,
        outlook: Outlook,
        max_running: int,
        max_waiting: int,
        tell: Tell,
        on_dead: Callable[[], None],
        *,
        unasked: int | None = None,
    ) -> None:
        self.outlook = outlook
        self._llm, self._info, self._unasked, self._max_running = llm, info, unasked, max_running
        self._limits = Limits(info.max_model_len, info.vocab_size, max_waiting)
        self._tell = tell
        self._on_dead = on_dead
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, Answer] = {}
        self._count = _Count()

    # ---- requests

    def submit(self, request: GenerateRequest) -> None:
        """Take a request up, or tell why not."""
        try:
            params, terms = self._admit(request)
        except SortServeError as error:
            if isinstance(error, OverloadedError):
                self._count.dropped[error.code] += 1
            self._tell([FailedEvent.of(request.request_id, error)])
            return
        self._count.prompt_tokens += len(request.prompt)
        starts = self._info.ladder.entries[terms.ceiling].id
        answer = Answer(request, starts, terms.kv_mode)
        self._answers[request.request_id] = answer
        task = self._tasks[request.request_id] = asyncio.create_task(self._serve(answer, params))
        task.add_done_callback(lambda _: self._ended(answer))

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

    async def pulse(self) -> None:
        """Return once vLLM's engine core has answered a question, which it does between two steps."""
        try:
            await self._llm.is_sleeping()
        except EngineDeadError:
            self._on_dead()
            raise

    def forget(self) -> None:
        """Count from nothing again: what ran until now was no client's."""
        self._count = _Count()
        self.outlook.forget()

    def _admit(self, request: GenerateRequest) -> tuple[SamplingParams, Terms]:
        """Raises what a request that cannot be served is refused with."""
        check_request(request, self._limits)
        ladder = self._info.ladder
        terms = resolve_terms(request, ladder, self._unasked)
        running = sum(answer.accepted for answer in self._answers.values())
        waiting = max(0, len(self._answers) - self._max_running)  # whoever has a seat may be at its prompt still
        if waiting >= self._limits.max_waiting:
            raise OverloadedError(
                f"{waiting} requests are waiting, the queue holds {self._limits.max_waiting}", retry_after=RETRY_SECONDS
            )
        self.outlook.check(request, terms, running)
        grammar = request.sampling.grammar
        try:
            params = SamplingParams(
                **sampling_arguments(request, self._info.eos_token_ids),
                extra_args=extra_args(request, terms, ladder, time.time() - time.monotonic()),
                structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=lark(grammar)),
                output_kind=RequestOutputKind.DELTA,
            )
        except ValueError as error:
            raise RequestError(f"the vllm back end cannot do this: {error}") from error
        return params, terms

    async def _serve(self, answer: Answer, params: SamplingParams) -> None:
        request_id = answer.asked.request_id
        try:
            prompt: Any = {"prompt_token_ids": list(answer.asked.prompt)}
            async for output in self._llm.generate(prompt, params, request_id):
                events = answer.take(read(output), time.monotonic())
                self._count.events(answer, events)
                self._tell(events)
        except EngineDeadError:
            answer.over = True  # it hears from whoever sees this process end
            self._on_dead()
        except (VLLMClientError, ValueError) as error:
            answer.over = True
            self._tell([FailedEvent.of(request_id, RequestError(f"vLLM refused the request: {error}"))])
        except Exception as error:  # of this request only: vLLM's engine core lives
            answer.over = True
            self._tell([FailedEvent.of(request_id, EngineFailedError(f"vLLM failed on this request: {error!r}"))])

    def _ended(self, answer: Answer) -> None:
        """However its task ended, also before it began to run: one terminal event. vLLM aborts a request whose stream is
        closed."""
        self._tasks.pop(answer.asked.request_id)
        self._answers.pop(answer.asked.request_id)
        if not answer.over:
            self._tell([answer.aborted(time.monotonic())])

    # ---- what is asked

    def stats(self) -> EngineStats:
        """A snapshot, a quarter of a second old where the scheduler counts."""
        running = sum(answer.accepted for answer in self._answers.values())
        return self.outlook.stats(running, len(self._answers) - running, self._count.stats())

    def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """What one more request would take now, by sub-model id."""
        return self.outlook.one_more(prompt_tokens, self._answers.values())


class _Count:
    """Counters of what passes through here."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.dropped: Counter[str] = Counter()
        self._generated: Counter[str] = Counter()
        self._cached = self._looked_up = self._preemptions = self._recomputed = 0

    def events(self, answer: Answer, events: list[Event]) -> None:
        """Events of one output."""
        for event in events:
            if isinstance(event, TokenEvent):
                self._generated[event.submodel] += 1
            elif isinstance(event, FinishedEvent):
                self._looked_up += len(answer.asked.prompt)
                self._cached += event.summary.cached_tokens
                self._preemptions += event.summary.preemptions
                self._recomputed += event.summary.refilled_tokens

    def stats(self) -> EngineStats:
        """Those that are known here."""
        return EngineStats(
            preemptions=self._preemptions,
            refilled_tokens=self._recomputed,
            prefix_queries=self._looked_up,
            prefix_hits=self._cached,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=dict(self._generated),
            dropped=dict(self.dropped),
        )


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
        cached=output.num_cached_tokens or 0,
    )
