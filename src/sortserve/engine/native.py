"""The native back end: the engine in a thread of its own behind the async protocol.

Nothing above the protocol may know that it is a thread: only the frozen data of `protocol.py` crosses.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.errors import DrainingError, EngineFailedError, SortServeError, UnavailableError
from sortserve.engine.protocol import (
    EngineInfo,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    Prediction,
)
from sortserve.engine.weights import Progress

logger = logging.getLogger(__name__)

T = TypeVar("T")
Command = Callable[[Engine], None]
"""Runs on the engine's thread between two steps."""


class NativeBackend:
    """One engine, one thread. See `protocol.Backend` for the methods' contracts."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self._config = config
        self._progress = progress
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Event]] = {}  # touched on the event loop only
        self._questions: set[asyncio.Future[Any]] = set()  # likewise; not answered yet
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._draining = False
        self._failure: str | None = None

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        assert self._engine is not None, "start() has not returned"
        return self._engine.info

    @property
    def alive(self) -> bool:
        """False once the engine has died."""
        return self._failure is None

    async def start(self) -> None:
        """Load on the engine's own thread, then start stepping there."""
        self._loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Engine] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="engine", daemon=True)
        self._thread.start()
        self._engine = await loaded

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Submit and stream; leaving early aborts."""
        refusal: SortServeError | None = None
        if self._draining:
            refusal = DrainingError("the server is shutting down and accepts no new requests", retry_after=1.0)
        elif self._failure is not None:
            refusal = EngineFailedError(f"the engine has failed: {self._failure}", retry_after=1.0)
        if refusal is not None:
            yield _failed(request.request_id, refusal)
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._streams[request.request_id] = events
        self._commands.put(lambda engine: self._submit(engine, request))
        try:
            while True:
                event = await events.get()
                if isinstance(event, FinishedEvent | FailedEvent):
                    del self._streams[request.request_id]
                    yield event
                    return
                yield event
        finally:
            if self._streams.pop(request.request_id, None) is not None:
                self._commands.put(lambda engine: self._abort(engine, request.request_id))

    async def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        return await self._ask(lambda engine: engine.scheduler.stats())

    async def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """See `Engine.predict`."""
        return await self._ask(lambda engine: engine.predict(prompt_tokens))

    async def drain(self, timeout: float) -> None:
        """Finish what runs, abort what is left after `timeout` seconds, and stop the thread."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self._streams and self.alive and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for request_id in list(self._streams):
            self._commands.put(lambda engine, request_id=request_id: self._abort(engine, request_id))  # type: ignore[misc]
        self._commands.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._leave_unanswered("the engine has stopped")

    async def _ask(self, question: Callable[[Engine], T]) -> T:
        """Run `question` on the engine's thread and return its answer."""
        if self._failure is not None:
            raise EngineFailedError(f"the engine has failed: {self._failure}")
        if self._thread is None or not self._thread.is_alive():
            raise EngineFailedError("the engine has stopped")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def command(engine: Engine) -> None:
            loop.call_soon_threadsafe(_settle, answer, question(engine), None)

        self._questions.add(answer)
        self._commands.put(command)
        try:
            return await answer
        finally:
            self._questions.discard(answer)

    def _leave_unanswered(self, why: str) -> None:
        for answer in self._questions:
            if not answer.done():
                answer.set_exception(EngineFailedError(why))

    # ---- on the engine's thread

    def _run(self, loaded: "asyncio.Future[Engine]") -> None:
        """Load and step on one thread: OpenMP keeps a team of workers per calling thread, and once two threads have
        teams, more than there are cores, its barriers sleep instead of spinning (a step of the bundled model took 18 ms
        instead of 3)."""
        assert self._loop is not None
        try:
            engine = Engine.load(self._config, self._progress)
        except BaseException as error:
            self._loop.call_soon_threadsafe(_settle, loaded, None, error)
            return
        self._loop.call_soon_threadsafe(_settle, loaded, engine, None)
        try:
            while self._obey(engine):
                self._deliver(engine.step())
        except Exception as error:
            # a bug or a lack of memory: whoever waits must hear it, and the server must say that it is not alive
            logger.exception("the engine failed")
            self._failure = type(error).__name__
            self._loop.call_soon_threadsafe(self._fail_all)

    def _obey(self, engine: Engine) -> bool:
        """Run what was asked since the last step; waits while there is nothing to do. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not engine.scheduler.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _submit(self, engine: Engine, request: GenerateRequest) -> None:
        try:
            engine.scheduler.add(request)
        except SortServeError as error:
            self._deliver([_failed(request.request_id, error)])

    def _abort(self, engine: Engine, request_id: str) -> None:
        event = engine.scheduler.abort(request_id, time.monotonic())
        if event is not None:
            self._deliver([event])

    def _deliver(self, events: list[Event]) -> None:
        if events:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._spread, events)

    # ---- on the event loop

    def _spread(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.put_nowait(event)

    def _fail_all(self) -> None:
        error = EngineFailedError(f"the engine failed under the request: {self._failure}")
        for request_id, stream in self._streams.items():
            stream.put_nowait(_failed(request_id, error))
        self._leave_unanswered(error.message)


def _settle(future: "asyncio.Future[T]", value: T | None, error: BaseException | None) -> None:
    """Resolve a future on its event loop, unless whoever waited has gone."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)  # type: ignore[arg-type]


def _failed(request_id: str, error: SortServeError) -> FailedEvent:
    retry_after = error.retry_after if isinstance(error, UnavailableError) else None
    return FailedEvent(request_id, type(error).__name__, error.message, error.param, retry_after)
