"""One engine process as seen from the other side: started, loaded, asked, listened to, and ended.

What is asked of an engine that has ended raises EngineFailedError; every request it had hears a FailedEvent, once.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from sortserve.engine import messages
from sortserve.engine.config import EngineConfig
from sortserve.engine.errors import EngineFailedError, StartupError, error_named
from sortserve.engine.logs import configured_format
from sortserve.engine.messages import (
    Abort,
    Answer,
    Ask,
    Expect,
    Happened,
    Load,
    Loaded,
    Loading,
    NotLoaded,
    Stop,
    Submit,
)
from sortserve.engine.protocol import EngineInfo, Event, FailedEvent, FinishedEvent, GenerateRequest

_LOG = logging.getLogger(__name__)
COMMAND = (sys.executable, "-P", "-m", "sortserve.engine.process")  # -P: no module beside the user's files is ours
VLLM_COMMAND = (sys.executable, "-P", "-m", "sortserve.engine.vllm.process")
ENVIRONMENT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "GOMP_SPINCOUNT": "2000"}
"""PyTorch and oneDNN keep 1,024 compiled products each, one per matrix and number of rows: 550 MiB after 12,000 requests
in batches of all sizes, 65 MiB with these few, which hold the products of ten sizes. Threads that wait for others spin
for some microseconds before they sleep: with OpenMP's default, milliseconds, they use up what they could work beside
another process (docs/diary.md, 2026-11-27). Read when torch is loaded; what the user has set wins."""
_CONNECT_MILLISECONDS = 20  # from one try to the next
_PULSE_SECONDS = 1.0
_GRACE_SECONDS = 0.5  # for what a process said last to arrive
_PART_SECONDS = 0.5

Progress = Callable[[int, int], None]
"""Called with (layers loaded, layers)."""


class EngineConnection:
    """One incarnation of the engine process."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", process: asyncio.subprocess.Process, progress: Progress | None
    ) -> None:
        self._socket = socket
        self._process = process
        self._progress = progress
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._questions: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._over: str | None = None
        self._loop.add_reader(socket.fileno(), self._read)

    @classmethod
    async def spawn(
        cls,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        progress: Progress | None = None,
        command: Sequence[str] = COMMAND,
    ) -> "EngineConnection":
        """Start the process, which binds `endpoint` and is ended by whoever has the connection."""
        # its own session: Ctrl-C is for the server, which tells the engine what it must know
        process = await asyncio.create_subprocess_exec(
            *command, endpoint, stdin=asyncio.subprocess.PIPE, start_new_session=True, env=ENVIRONMENT | os.environ
        )
        try:
            socket = context.socket(zmq.PAIR)
            socket.set_hwm(0)
            socket.linger = 0
            socket.reconnect_ivl = _CONNECT_MILLISECONDS
            socket.connect(endpoint)  # the side that connects may send before the other one is there
            return cls(socket, process, progress)
        except BaseException:
            process.kill()
            await process.wait()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def load(self, config: EngineConfig) -> EngineInfo:
        """Have the model loaded. Raises StartupError as the engine does, EngineFailedError if the process dies of it."""
        self._tell(Load(config, _LOG.getEffectiveLevel(), configured_format()))
        exited = asyncio.create_task(self._process.wait())
        try:
            ends: set[asyncio.Future[Any]] = {self._loaded, exited}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._loaded.done():  # its last words may still be on their way
                await asyncio.wait({self._loaded}, timeout=_GRACE_SECONDS)
        finally:
            exited.cancel()
        if not self._loaded.done():
            raise EngineFailedError(f"the engine process died while it was loading: {self._exit_status()}")
        return self._loaded.result()

    def submit(self, request: GenerateRequest) -> asyncio.Queue[Event]:
        """Hand a request over; its events, the last of which is terminal, come in the queue."""
        events = self._streams[request.request_id] = asyncio.Queue()
        if self._over is not None:
            self._fail(request.request_id)
        else:
            self._tell(Submit(request))
        return events

    def expect(self) -> None:
        """A request is being read. An engine that idles wakes up meanwhile: that takes as long again as reading it."""
        if not self._streams:
            self._tell(Expect())

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
        pulse: asyncio.Task[Answer] | None = None
        try:
            while True:
                pulse = asyncio.create_task(self.ask("pulse"))
                await _first_of({exited, pulse}, hang_seconds)
                if exited.done():
                    return f"its process died: {self._exit_status()}"
                if not pulse.done():
                    return f"it hung: no step ended for {hang_seconds:g} s"
                await asyncio.wait({exited}, timeout=min(_PULSE_SECONDS, hang_seconds))
        finally:
            exited.cancel()
            if pulse is not None:
                pulse.cancel()
                await asyncio.gather(pulse, return_exceptions=True)

    async def stop(self, timeout: float) -> None:
        """Tell the process to end, and end it if it has not done so after `timeout` seconds."""
        self._tell(Stop())
        try:
            async with asyncio.timeout(timeout):
                await self._process.wait()
                if self._process.returncode == 0:
                    await self._stopped  # the last events may still be on their way
        except TimeoutError:
            _LOG.warning("the engine process did not end within %g s and was killed", timeout)
        await self.kill("the engine has stopped")

    async def kill(self, why: str) -> None:
        """End the process at once, if it still runs, and everything that waits for it. May be called again."""
        if self._over is None:
            self._over = why
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._kill_group()  # also one that was stopped; a process that died may leave others behind
        self._loaded.cancel()
        for request_id in list(self._streams):
            self._fail(request_id)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(EngineFailedError(why))
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()  # last: the system may take its time to give a large process's memory back

    def _kill_group(self) -> None:
        """The process and those that it started (vLLM's engine core): it leads a session of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        """Take whatever has come. The socket tells once that something came, not as long as it lies there."""
        while self._over is None and self._socket.poll(0):
            self._take(messages.decode_report(self._socket.recv(zmq.NOBLOCK)))

    def _take(self, report: messages.Report) -> None:
        if isinstance(report, Happened):
            for event in report.events:
                self._deliver(event)
        elif isinstance(report, Answer):
            answer = self._questions.get(report.number)
            if answer is not None and not answer.done():
                answer.set_result(report)
        elif isinstance(report, Loading):
            if self._progress is not None:
                self._progress(report.layers_loaded, report.num_layers)
        elif isinstance(report, Loaded):
            self._loaded.set_result(report.info)
        elif isinstance(report, NotLoaded):
            kind = error_named(report.error)
            error = kind if issubclass(kind, StartupError) else StartupError
            self._loaded.set_exception(error(report.message, param=report.param))
        else:
            self._stopped.set_result(None)

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
        """Send without waiting: no limit is set on what may lie there, so it is taken at once."""
        if self._over is None:
            self._socket.send(messages.encode(command), zmq.NOBLOCK)
            self._loop.call_soon(self._read)  # sending may have taken the word that something came

    def _exit_status(self) -> str:
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


async def _first_of(tasks: "set[asyncio.Task[Any]]", seconds: float) -> None:
    """Wait until one of the tasks is done, or for `seconds` in which this process ran: where it was stopped (Ctrl-Z, a
    paused container), so perhaps was the other one, and an answer may lie there."""
    waited = 0.0
    while waited < seconds and not any(task.done() for task in tasks):
        part = min(_PART_SECONDS, seconds - waited)
        await asyncio.wait(tasks, timeout=part, return_when=asyncio.FIRST_COMPLETED)
        waited += part
