"""The native back end: an engine in a process of its own, and a new one whenever it dies or hangs.

A dead engine fails the requests that it had. The next one is started at once; if that dies young too, after a pause that
doubles. An engine that cannot even be loaded several times in a row is given up.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from sortserve.engine.config import EngineConfig
from sortserve.engine.connection import COMMAND, EngineConnection, Progress
from sortserve.engine.errors import DrainingError, EngineFailedError, SortServeError, StartupError
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
_RELOAD_SECONDS = 600.0  # an engine that is not back by then is counted as one that cannot be loaded
_STOP_SECONDS = 5.0
_MOST_PATH_BYTES = 107 - len("/engine-1000000")  # of a Unix socket, less the name in it
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
        self._given_up = False
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
        return not self._given_up

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

    def expect(self) -> None:
        """Wake the engine where it idles."""
        if self._engine is not None:
            self._engine.expect()

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
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(DrainingError("the server was stopped while it was loading"))

    def _running(self) -> EngineConnection:
        if self._engine is None:
            raise EngineFailedError("the engine has stopped" if self._draining else "the engine is being restarted")
        return self._engine

    def _refusal(self, request_id: str) -> FailedEvent:
        error: SortServeError
        if self._draining:
            error = DrainingError("the server is shutting down and accepts no new requests")
        elif self._given_up:
            error = EngineFailedError("the engine has died and is not coming back; the server must be restarted")
        else:
            error = EngineFailedError("the engine is being restarted; try again in a moment")
        return FailedEvent.of(request_id, error)

    async def _supervise(self, loaded: "asyncio.Future[None]") -> None:
        """Start engines one after the other until cancelled, or until one cannot be loaded."""
        try:
            with contextlib.ExitStack() as stack:
                directory = stack.enter_context(_socket_directory())
                context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
                stack.callback(context.destroy, linger=0)
                await self._start_engines(context, directory, loaded)
        except Exception as error:  # whoever waits must hear of it, and probes that no engine will follow
            if not isinstance(error, StartupError):
                _LOG.exception("the supervisor failed")
            self._given_up = True
            if not loaded.done():
                loaded.set_exception(error)

    async def _start_engines(
        self, context: "zmq.Context[zmq.Socket[bytes]]", directory: Path, loaded: "asyncio.Future[None]"
    ) -> None:
        failed_loads = young_deaths = 0
        while True:
            began = time.monotonic()
            try:
                await self._run_engine(context, directory / f"engine-{self._restarts}", loaded)
                failed_loads = 0
            except SortServeError as error:
                if not loaded.done():
                    loaded.set_exception(error)
                    return
                failed_loads += 1
                _LOG.error("the engine could not be started again: %s", error.message)
                if failed_loads == _MOST_FAILED_LOADS:
                    self._given_up = True
                    return
            # from its start on: where loading takes long, it is pause enough
            young_deaths = young_deaths + 1 if time.monotonic() - began < _YOUNG_SECONDS else 0
            self._restarts += 1
            await asyncio.sleep(_PAUSES[min(young_deaths, len(_PAUSES)) - 1] if young_deaths else 0.0)

    async def _run_engine(
        self, context: "zmq.Context[zmq.Socket[bytes]]", socket: Path, loaded: "asyncio.Future[None]"
    ) -> None:
        """One engine from its start to its end. Raises SortServeError if it does not come to be loaded."""
        try:
            engine = await EngineConnection.spawn(context, f"ipc://{socket}", self._progress, self._command)
        except (OSError, zmq.ZMQError) as error:
            raise EngineFailedError(f"its process cannot be started: {error}") from error
        why = "the engine has stopped"
        try:
            self._info = await self._load(engine, None if not loaded.done() else _RELOAD_SECONDS)
            # the next one gets the same, however much memory is free then
            info = self._info
            self._config = replace(self._config, kv_bytes=info.kv_bytes, max_model_len=info.max_model_len)
            self._engine = engine
            if not loaded.done():
                loaded.set_result(None)
            else:
                _LOG.info("the engine is back: restart %d", self._restarts)
            why = await engine.ended(self._hang_seconds)
            _LOG.error("the engine failed with %d requests in it: %s", engine.num_open, why)
        except asyncio.CancelledError:
            if self._engine is engine:
                await engine.stop(_STOP_SECONDS)
            raise
        finally:
            self._engine = None
            await _to_the_end(engine.kill(why))
            socket.unlink(missing_ok=True)

    async def _load(self, engine: EngineConnection, seconds: float | None) -> EngineInfo:
        try:
            async with asyncio.timeout(seconds):
                return await engine.load(self._config)
        except TimeoutError as error:
            raise EngineFailedError(f"it was not loaded within {seconds:g} s") from error


@contextlib.contextmanager
def _socket_directory() -> Iterator[Path]:
    """A directory that nobody else may read. Raises StartupError if there is no place for it."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="sortserve-"))
    except OSError as error:
        raise StartupError(f"no place for the engine's socket ({error}); set TMPDIR to a writable folder") from error
    try:
        if len(os.fsencode(directory)) > _MOST_PATH_BYTES:
            raise StartupError(f"{directory} is too long for a socket's path; set TMPDIR to a shorter one")
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` even if cancelled meanwhile: a drain may come while a dead engine is cleared away."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
