"""The events of several requests to a back end, merged in the order they come, and aborted when nobody listens."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from starlette.types import Receive

from sortserve.engine.errors import DrainingError, EngineFailedError, SortServeError
from sortserve.engine.protocol import (
    AcceptedEvent,
    Backend,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    PromptLogprobsEvent,
    TokenEvent,
)
from sortserve.server.errors import INTERNAL_MESSAGE

_LOG = logging.getLogger("sortserve.server")

T = TypeVar("T")
AnswerEvent = AcceptedEvent | PromptLogprobsEvent | TokenEvent | FinishedEvent


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


class EventStreams:
    """One back end stream per request; `close` aborts what still runs. Several are read by a task each, one is read where
    its events are wanted: a task between them and the client would cost a switch per token."""

    def __init__(self, backend: Backend, requests: Sequence[GenerateRequest]) -> None:
        self._queue: asyncio.Queue[tuple[int, Event | SortServeError]] = asyncio.Queue()
        self._early: list[tuple[int, AnswerEvent]] = []  # came before headers were sent
        self._open = set(range(len(requests)))
        self._tasks: list[asyncio.Task[None]] = []
        self._only: AsyncIterator[Event | SortServeError] | None = None
        if len(requests) == 1:
            self._only = _read(backend, requests[0])
        else:
            self._tasks = [asyncio.create_task(self._pump(backend, place, one)) for place, one in enumerate(requests)]

    async def begun(self) -> list[tuple[int, AcceptedEvent]]:
        """Wait until every request is accepted, or the first token is there: then headers can be sent.

        What came by then is told again by `events`. Raises the error of the first request that is refused, or
        DrainingError if one is given up.
        """
        accepted: list[tuple[int, AcceptedEvent]] = []
        while len(accepted) < len(self._open):
            place, event = await self._next()
            self._early.append((place, event))
            if isinstance(event, AcceptedEvent):
                accepted.append((place, event))
            elif isinstance(event, FinishedEvent) and event.reason == "abort":  # only a drain ends what has not begun
                raise DrainingError("the server shut down before the answer was begun; ask another replica")
            elif isinstance(event, TokenEvent):
                break
        return accepted

    async def events(self) -> AsyncIterator[tuple[int, AnswerEvent]]:
        """(place of the request, event) until every request has finished or was stopped. Raises as `begun`."""
        for place, early in self._early:
            if self._take(place, early):
                yield place, early
        while self._open:
            place, event = await self._next()
            if self._take(place, event):
                yield place, event

    def stop(self, place: int) -> None:
        """Abort one request: its answer is complete."""
        self._open.discard(place)
        if self._only is None:
            self._tasks[place].cancel()
        else:  # at once, not when the last chunk has left: the client may read slowly
            self._tasks.append(asyncio.create_task(_close(self._only)))

    async def close(self) -> None:
        """Abort every request that still runs, and wait until the back end has let go of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._only is not None:
            await _close(self._only)

    def _take(self, place: int, event: AnswerEvent) -> bool:
        """Whether the event still counts: of a request that was stopped, tokens may be on their way."""
        counts = place in self._open
        if isinstance(event, FinishedEvent):
            self._open.discard(place)
        return counts

    async def _next(self) -> tuple[int, AnswerEvent]:
        if self._only is not None:
            place, event = 0, await anext(self._only)
        else:
            place, event = await self._queue.get()
            while place not in self._open:  # of a request that was stopped, even a failure is of no interest
                place, event = await self._queue.get()
        if isinstance(event, SortServeError):
            raise event
        if isinstance(event, FailedEvent):
            raise event.as_error()
        return place, event

    async def _pump(self, backend: Backend, place: int, request: GenerateRequest) -> None:
        events = _read(backend, request)
        try:
            async for event in events:
                self._queue.put_nowait((place, event))
        finally:
            await _close(events)


async def _read(backend: Backend, request: GenerateRequest) -> AsyncIterator[Event | SortServeError]:
    """A request's events to the terminal one, or the error that stands in its place. Closing it aborts the request."""
    events = backend.generate(request)
    try:
        async for event in events:
            yield event
            if isinstance(event, FinishedEvent | FailedEvent):
                return
        yield EngineFailedError("the engine ended the answer without saying why")
    except SortServeError as error:
        yield error
    except Exception:
        _LOG.exception("request %s: the back end raised", request.request_id)
        yield SortServeError(INTERNAL_MESSAGE)
    finally:
        await _close(events)


async def _close(events: AsyncIterator[object]) -> None:
    """End a generator now, not when it is collected; an iterator that is none ends with its task."""
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


async def gone(receive: Receive) -> None:
    """Return when the client has closed the connection. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, cancelled as soon as the client leaves. Raises ClientGoneError then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
