"""A job from the back end's events to the HTTP response, streamed or whole."""

import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import sortserve
from sortserve.engine.errors import DrainingError, EngineFailedError, SortServeError
from sortserve.engine.protocol import AcceptedEvent, FinishedEvent, PromptLogprobsEvent
from sortserve.server.answer import (
    Answer,
    Delta,
    all_met,
    first_token_seconds,
    tell,
    usage,
)
from sortserve.server.errors import INTERNAL_MESSAGE, error_object
from sortserve.server.formats import format_of
from sortserve.server.prepare import Job
from sortserve.server.sse import DONE, EventStreamResponse, event
from sortserve.server.state import ServerState
from sortserve.server.streams import AnswerEvent, EventStreams, unless_gone
from sortserve.server.tool_calls import ToolCall

_LOG = logging.getLogger("sortserve.server")


class Generation:
    """One job under way."""

    def __init__(self, state: ServerState, job: Job) -> None:
        self.job = job
        self.answers = [Answer(job, place, state.tokenizer) for place in range(len(job.prompts) * job.num_choices)]
        self._state = state
        self._format = format_of(job, state.tokenizer)
        self._streams: EventStreams | None = None

    async def respond(self, request: Request) -> Response:
        """The response. Raises SortServeError before anything is sent, ClientGoneError if the client leaves by then."""
        try:
            if not self.job.stream:
                return await unless_gone(request.receive, self._whole())
            await unless_gone(request.receive, self._begin())
            return EventStreamResponse(self._chunks(), self._headers(), self._close)
        except BaseException:
            await self._close()
            raise

    @property
    def accepted(self) -> list[AcceptedEvent]:
        """What the answers that have begun were told."""
        return [answer.accepted for answer in self.answers if answer.accepted is not None]

    @property
    def submodel(self) -> str:
        """The sub-model chosen first."""
        return self.accepted[0].submodel if self.accepted else "none"

    @property
    def predicted_seconds(self) -> float | None:
        """The longest time any of the answers was predicted to take; None without a budget."""
        times = [event.predicted_seconds for event in self.accepted if event.predicted_seconds is not None]
        return max(times, default=None)

    async def _begin(self) -> EventStreams:
        self._streams = EventStreams(self._state.backend, self.job.requests())
        for place, accepted in await self._streams.begun():
            self.answers[place].accepted = accepted
        return self._streams

    async def _close(self) -> None:
        if self._streams is not None:
            await self._streams.close()

    async def _whole(self) -> Response:
        streams = await self._begin()
        texts = [answer.open().text for answer in self.answers]
        entries: list[list[Any]] = [[] for _ in self.answers]
        calls: list[list[ToolCall]] = [[] for _ in self.answers]
        async for place, got in streams.events():
            delta = self._take(streams, place, got)
            texts[place] += delta.text
            entries[place].extend(delta.entries)
            calls[place].extend(delta.calls)
        await streams.close()
        now = time.monotonic()
        choices = [
            self._format.choice(
                place,
                texts[place],
                entries[place] if self.job.tell_logprobs else None,
                answer.finish_reason or "stop",
                calls[place],
            )
            for place, answer in enumerate(self.answers)
        ]
        body = self._envelope(self._format.whole_object, choices, self.submodel)
        body["usage"] = usage(self.job, self.answers)
        body["sortserve"] = tell(self.job, self.answers, now)
        return Response(msgspec.json.encode(body), headers=self._headers(now), media_type="application/json")

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        """The events of the stream; an error after the 200 is one of them."""
        try:
            async for chunk in self._answer_chunks():
                yield chunk
        except SortServeError as error:
            yield event({"error": error_object(error)})
        except Exception:
            _LOG.exception("%s failed while it was streamed", self.job.id)
            yield event({"error": error_object(SortServeError(INTERNAL_MESSAGE))})
        yield DONE

    async def _answer_chunks(self) -> AsyncGenerator[bytes, None]:
        assert self._streams is not None
        for place, answer in enumerate(self.answers):
            opening = self._format.opening(place)
            if opening is not None:
                yield self._event([opening], self.submodel, told=False)
            delta = answer.open()
            if not delta.empty:
                yield self._chunk(place, delta)
        async for place, got in self._streams.events():
            delta = self._take(self._streams, place, got)
            if self.answers[place].finish_reason is None:
                if not delta.empty:
                    yield self._chunk(place, delta)
                continue
            complete = all(answer.finish_reason is not None for answer in self.answers)
            # who asks for no usage chunk is told in the last one
            yield self._chunk(place, delta, told=complete and not self.job.include_usage)
        if self.job.include_usage:
            yield self._event([], self.submodel, told=True)

    def _take(self, streams: EventStreams, place: int, got: AnswerEvent) -> Delta:
        """What may leave because of one event. Raises UnavailableError if the engine gave the request up."""
        answer = self.answers[place]
        if isinstance(got, AcceptedEvent):
            answer.accepted = got
            return Delta()
        if isinstance(got, PromptLogprobsEvent):
            return answer.prompt(got)
        if isinstance(got, FinishedEvent):
            if got.reason == "abort":
                if self._state.phase == "draining":
                    raise DrainingError("the server shut down before the answer was complete; ask another replica")
                raise EngineFailedError("the engine gave the request up before the answer was complete; send it again")
            return answer.finish(got)
        delta = answer.token(got, time.monotonic())
        if answer.finish_reason is not None:
            streams.stop(place)
        return delta

    def _chunk(self, place: int, delta: Delta, told: bool = False) -> bytes:
        """What leaves of one answer; `told`: with the `sortserve` object."""
        answer = self.answers[place]
        entries = delta.entries if self.job.tell_logprobs else None
        choice = self._format.delta(place, delta.text, entries, answer.finish_reason, delta.calls)
        return self._event([choice], answer.submodel or self.submodel, told)

    def _event(self, choices: list[dict[str, Any]], submodel: str, told: bool) -> bytes:
        """One event of the stream: without choices the one with the usage."""
        chunk = self._envelope(self._format.chunk_object, choices, submodel)
        if not choices or self.job.usage_in_every_chunk:
            chunk["usage"] = usage(self.job, self.answers)
        elif self.job.include_usage:
            chunk["usage"] = None
        if told:
            chunk["sortserve"] = tell(self.job, self.answers, time.monotonic())
        return event(chunk)

    def _envelope(self, kind: str, choices: list[dict[str, Any]], submodel: str) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": kind,
            "created": self.job.created,
            "model": self.job.model,
            "system_fingerprint": f"sortserve-{sortserve.__version__}-{submodel}",
            "choices": choices,
        }

    def _headers(self, finished: float | None = None) -> dict[str, str]:
        """The contract's headers; with `finished`, when a whole body is ready, also what became of the budget."""
        headers = {"X-Submodel": self.submodel}
        budget = self.job.terms.budget
        if budget is not None:
            given = {"": budget.total_ms, "-TTFT": budget.ttft_ms, "-TPOT": budget.tpot_ms}
            headers |= {f"X-Latency-Budget{part}-Ms": f"{ms:.10g}" for part, ms in given.items() if ms is not None}
            predicted_met = all(event.predicted_met for event in self.accepted)
            headers["X-Latency-Budget-Status"] = "ok" if predicted_met else "predicted-miss"
        if self.predicted_seconds is not None:
            headers["X-Latency-Predicted-Ms"] = f"{self.predicted_seconds * 1e3:.0f}"
        if finished is not None and budget is not None:
            met = all_met(self.job, self.answers, finished)
            headers["X-Latency-Budget-Status"] = "met" if met else "missed"
        headers["Server-Timing"] = self._timing(finished)
        return headers

    def _timing(self, finished: float | None) -> str:
        """`Server-Timing`, of the first answer; what has not happened when the headers leave is left out."""
        parts: dict[str, float] = {}
        if self.accepted:
            parts["queue"] = self.accepted[0].queue_seconds
        first = first_token_seconds(self.job, self.answers[:1])
        if finished is not None and first is not None:
            parts["prefill"] = first - parts.get("queue", 0.0)
            parts["decode"] = finished - self.job.arrival - first
        return ", ".join(f"{name};dur={max(0.0, seconds) * 1e3:.1f}" for name, seconds in parts.items())
