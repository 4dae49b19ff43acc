"""The native back end: an engine in a process of its own, and a new one whenever it dies or hangs.

A dead engine fails the requests that it had. The next one is started at once; if that dies young too, after a pause that
doubles. An engine that cannot even be loaded several times in a row is given up.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import zmq

from sortserve.engine.config import EngineConfig
from sortserve.engine.connection import COMMAND, EngineConnection, Progress
from sortserve.engine.errors import DrainingError, EngineFailedError, SortServeError
from sortserve.engine.protocol import (
    EngineInfo,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    Prediction,
)

_LOG = logging.getLogger(__name__)
HANG_SECONDS = 60.0  # longer than the longest step: 256 rows of a 7B model on two cores take some 20 s
_YOUNG_SECONDS = 10.0  # an engine that dies before this age is followed by a pause
_PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds, by the number of engines that died young in a row
_MOST_FAILED_LOADS = 5
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02


class ProcessBackend:
    """Supervises one engine process at a time. See `protocol.Backend` for the methods' contracts."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress | None = None,
        *,
        hang_seconds: float = HANG_SECONDS,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._config = config
        self._progress = progress
        self._hang_seconds = hang_seconds
        self._command = command
        self._info: EngineInfo | None = None
        self._engine: EngineConnection | None = None  # None while there is none that takes requests
        self._supervision: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._given_up: str | None = None
        self._draining = False
        self._restarts = 0

    @property
    def info(self) -> EngineInfo:
        """What is served; as of the last engine that was loaded."""
        assert self._info is not None, "start() has not returned"
        return self._info

    @property
    def alive(self) -> bool:
        """False once no further engine will be started."""
        return self._given_up is None

    @property
    def ready(self) -> bool:
        """Whether an engine takes requests now."""
        return self._engine is not None and not self._draining

    @property
    def restarts(self) -> int:
        """How many engines followed the first one."""
        return self._restarts

    @property
    def pid(self) -> int | None:
        """Of the engine process that takes requests now."""
        return None if self._engine is None else self._engine.pid

    async def start(self) -> None:
        """Start the first engine. Raises StartupError, EngineFailedError if its process dies, DrainingError if it was
        drained meanwhile."""
        self._loaded = asyncio.get_running_loop().create_future()
        self._supervision = asyncio.create_task(self._supervise(self._loaded))
        await self._loaded

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Submit and stream; leaving early aborts."""
        engine = self._engine
        if engine is None or self._draining:
            yield self._refusal(request.request_id)
            return
        events = engine.submit(request)
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, FinishedEvent | FailedEvent)
                yield event
        finally:
            if not ended:
                engine.abort(request.request_id)

    async def stats(self) -> EngineStats:
        """A snapshot between two steps. Raises EngineFailedError while there is no engine."""
        answer = await self._running().ask("stats")
        assert answer.stats is not None
        return answer.stats

    async def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """See `Engine.predict`. Raises EngineFailedError while there is no engine."""
        answer = await self._running().ask("predictions", prompt_tokens)
        assert answer.predictions is not None
        return answer.predictions

    async def drain(self, timeout: float) -> None:
        """Finish what runs, abort what is left after `timeout` seconds, and end the process; none follows."""
        self._draining = True
        engine = self._engine
        if engine is not None:
            deadline = time.monotonic() + timeout
            while engine.num_open and self._engine is engine and time.monotonic() < deadline:
                await asyncio.sleep(_POLL_SECONDS)
            engine.abort_all()
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)

    def _running(self) -> EngineConnection:
        if self._engine is None:
            raise EngineFailedError("the engine has stopped" if self._draining else "the engine is being restarted")
        return self._engine

    def _refusal(self, request_id: str) -> FailedEvent:
        error: SortServeError
        if self._draining:
            error = DrainingError("the server is shutting down and accepts no new requests")
        elif self._given_up is not None:
            error = EngineFailedError(f"the engine has failed and is not coming back: {self._given_up}")
        else:
            error = EngineFailedError("the engine is being restarted; try again in a moment")
        return FailedEvent(request_id, type(error).__name__, error.message, retry_after=1.0)

    async def _supervise(self, loaded: "asyncio.Future[None]") -> None:
        """Start engines one after the other until cancelled, or until one cannot be loaded."""
        directory = Path(tempfile.mkdtemp(prefix="sortserve-"))  # nobody else may read it
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            await self._start_engines(context, directory, loaded)
        except Exception as error:  # a bug: whoever waits must hear of it, and probes that no engine will follow
            _LOG.exception("the supervisor failed")
            self._given_up = type(error).__name__
            if not loaded.done():
                loaded.set_exception(error)
        finally:
            if not loaded.done():
                loaded.set_exception(DrainingError("the server was stopped while it was loading"))
            context.destroy(linger=0)
            shutil.rmtree(directory, ignore_errors=True)

    async def _start_engines(
        self, context: "zmq.Context[zmq.Socket[bytes]]", directory: Path, loaded: "asyncio.Future[None]"
    ) -> None:
        failed_loads = young_deaths = 0
        while True:
            socket = directory / f"engine-{self._restarts}"
            engine = await EngineConnection.spawn(context, f"ipc://{socket}", self._progress, self._command)
            why, began = "the engine has stopped", time.monotonic()
            try:
                self._info = await engine.load(self._config)
                failed_loads = 0
                began, self._engine = time.monotonic(), engine
                if not loaded.done():
                    loaded.set_result(None)
                else:
                    _LOG.info("the engine is back: restart %d", self._restarts)
                why = await engine.ended(self._hang_seconds)
                _LOG.error("the engine failed with %d requests in it: %s", engine.num_open, why)
            except SortServeError as error:
                if not loaded.done():
                    loaded.set_exception(error)
                    return
                failed_loads += 1
                _LOG.error("the engine could not be started again: %s", error.message)
                if failed_loads == _MOST_FAILED_LOADS:
                    self._given_up = error.message
                    return
            except asyncio.CancelledError:
                if self._engine is engine:
                    await engine.stop(_STOP_SECONDS)
                raise
            finally:
                self._engine = None
                await _to_the_end(engine.kill(why))
                socket.unlink(missing_ok=True)
            young_deaths = young_deaths + 1 if time.monotonic() - began < _YOUNG_SECONDS else 0
            self._restarts += 1
            await asyncio.sleep(_PAUSES[min(young_deaths, len(_PAUSES)) - 1] if young_deaths else 0.0)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` even if cancelled meanwhile: a drain may come while a dead engine is cleared away."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
