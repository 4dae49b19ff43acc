"""One engine process as seen from the other side: started, loaded, asked, listened to, and ended.

What is asked of an engine that has ended raises EngineFailedError; every request it had hears a FailedEvent, once.
"""

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
import zmq.asyncio

from sortserve.engine import messages
from sortserve.engine.config import EngineConfig
from sortserve.engine.errors import EngineFailedError, StartupError, error_named
from sortserve.engine.logs import configured_format
from sortserve.engine.messages import (
    Abort,
    Answer,
    Ask,
    Happened,
    Load,
    Loaded,
    Loading,
    NotLoaded,
    Stop,
    Stopped,
    Submit,
)
from sortserve.engine.protocol import EngineInfo, Event, FailedEvent, FinishedEvent, GenerateRequest

_LOG = logging.getLogger(__name__)
COMMAND = (sys.executable, "-P", "-m", "sortserve.engine.process")  # -P: no module beside the user's files is ours
_ENVIRONMENT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""PyTorch and oneDNN keep 1,024 compiled products each, one per matrix and number of rows: 550 MiB after 12,000 requests
in batches of all sizes, 65 MiB with these few, which hold the products of ten sizes. Read when torch is loaded."""
_PULSE_SECONDS = 1.0
_GRACE_SECONDS = 0.5  # after a time-out: it may be this process that was stopped, with the answer lying there

Progress = Callable[[int, int], None]
"""Called with (layers loaded, layers)."""


class EngineConnection:
    """One incarnation of the engine process."""

    def __init__(self, context: zmq.asyncio.Context, process: asyncio.subprocess.Process, endpoint: str) -> None:
        self._process = process
        self._endpoint = endpoint
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(endpoint)
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._questions: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()
        self._receiving: asyncio.Task[None] | None = None
        self._over: str | None = None

    @classmethod
    async def spawn(
        cls, context: zmq.asyncio.Context, directory: Path, name: str, command: Sequence[str] = COMMAND
    ) -> "EngineConnection":
        """Start the process; its socket is `directory`/`name`, reached by whoever may read the directory."""
        endpoint = f"ipc://{directory / name}"
        # its own session: Ctrl-C is for the server, which tells the engine what it must know
        process = await asyncio.create_subprocess_exec(
            *command, endpoint, stdin=asyncio.subprocess.PIPE, start_new_session=True, env=os.environ | _ENVIRONMENT
        )
        return cls(context, process, endpoint)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def load(self, config: EngineConfig, progress: Progress | None = None) -> EngineInfo:
        """Have the model loaded. Raises StartupError as the engine does, EngineFailedError if the process dies of it."""
        self._tell(Load(config, _LOG.getEffectiveLevel(), configured_format()))
        loading = asyncio.create_task(self._until_loaded(progress))
        exited = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({loading, exited}, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():  # its last words may still be on their way
                await asyncio.wait({loading}, timeout=_GRACE_SECONDS)
            if not loading.done():
                raise EngineFailedError(f"the engine process died while it was loading: {self._exit_status()}")
            info = loading.result()
        finally:
            for task in (loading, exited):
                task.cancel()
            await asyncio.gather(loading, exited, return_exceptions=True)
        self._receiving = asyncio.create_task(self._receive())
        return info

    def submit(self, request: GenerateRequest) -> asyncio.Queue[Event]:
        """Hand a request over; its events, the last of which is terminal, come in the queue."""
        events = self._streams[request.request_id] = asyncio.Queue()
        if self._over is not None:
            self._fail(request.request_id)
        else:
            self._tell(Submit(request))
        return events

    def abort(self, request_id: str) -> None:
        """End a request whose events nobody reads any more. Nothing if it has ended."""
        if self._streams.pop(request_id, None) is not None:
            self._tell(Abort(request_id))

    def abort_all(self) -> None:
        """End every request; each hears it as its terminal event."""
        for request_id in self._streams:
            self._tell(Abort(request_id))

    async def ask(self, subject: messages.Subject, prompt_tokens: int = 0) -> Answer:
        """Answered between two steps. Raises EngineFailedError if the engine has ended or does by then."""
        if self._over is not None:
            raise EngineFailedError(self._over)
        question = Ask(next(self._numbers), subject, prompt_tokens)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._questions[question.number] = answer
        self._tell(question)
        try:
            return await answer
        finally:
            del self._questions[question.number]

    async def ended(self, hang_seconds: float) -> str:
        """Wait until the process has died, or has not ended a step for `hang_seconds`; says which."""
        exited = asyncio.create_task(self._process.wait())
        try:
            while True:
                pulse = asyncio.create_task(self.ask("pulse"))
                await asyncio.wait({exited, pulse}, timeout=hang_seconds, return_when=asyncio.FIRST_COMPLETED)
                if not pulse.done() and not exited.done():
                    await asyncio.wait({exited, pulse}, timeout=_GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                pulse.cancel()
                await asyncio.gather(pulse, return_exceptions=True)
                if exited.done():
                    return f"its process died: {self._exit_status()}"
                if pulse.cancelled():
                    return f"it hung: no step ended for {hang_seconds:g} s"
                await asyncio.wait({exited}, timeout=min(_PULSE_SECONDS, hang_seconds))
        finally:
            exited.cancel()

    async def stop(self, timeout: float) -> None:
        """Tell the process to end, and end it if it has not done so after `timeout` seconds."""
        self._tell(Stop())
        try:
            async with asyncio.timeout(timeout):
                await self._process.wait()
                if self._receiving is not None and self._process.returncode == 0:
                    await self._receiving  # the last events may still be on their way
        except TimeoutError:
            _LOG.warning("the engine process did not end within %g s and was killed", timeout)
        await self.kill("the engine has stopped")

    async def kill(self, why: str) -> None:
        """End the process at once, if it still runs, and everything that waits for it. May be called again."""
        self._over = self._over or why
        if self._process.returncode is None:
            self._process.kill()  # also ends one that was stopped
        await self._process.wait()
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        for request_id in list(self._streams):
            self._fail(request_id)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(EngineFailedError(why))
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._socket.close()
        Path(self._endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    async def _until_loaded(self, progress: Progress | None) -> EngineInfo:
        while True:
            report = messages.decode_report(await self._socket.recv())
            if isinstance(report, Loaded):
                return report.info
            if isinstance(report, NotLoaded):
                kind = error_named(report.error)
                raise (kind if issubclass(kind, StartupError) else StartupError)(report.message, param=report.param)
            if isinstance(report, Loading) and progress is not None:
                progress(report.layers_loaded, report.num_layers)

    async def _receive(self) -> None:
        while True:
            report = messages.decode_report(await self._socket.recv())
            if isinstance(report, Happened):
                for event in report.events:
                    self._deliver(event)
            elif isinstance(report, Answer):
                answer = self._questions.get(report.number)
                if answer is not None and not answer.done():
                    answer.set_result(report)
            elif isinstance(report, Stopped):
                return

    def _deliver(self, event: Event) -> None:
        ends = isinstance(event, FinishedEvent | FailedEvent)
        stream = self._streams.pop(event.request_id, None) if ends else self._streams.get(event.request_id)
        if stream is not None:
            stream.put_nowait(event)

    def _fail(self, request_id: str) -> None:
        self._streams.pop(request_id).put_nowait(
            FailedEvent(request_id, EngineFailedError.__name__, f"the engine failed under the request: {self._over}")
        )

    def _tell(self, command: messages.Command) -> None:
        """Send without waiting: no limit is set on what may lie there, so it leaves at once."""
        if self._over is None:
            self._socket.send(messages.encode(command))

    def _exit_status(self) -> str:
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
