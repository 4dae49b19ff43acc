"""The engine process of `--backend vllm`: `python -m sortserve.engine.vllm.process SOCKET`, started by the supervisor.

It speaks the messages of our own engine process, so that the supervisor sees a crash, a hang and a drain alike. vLLM's
engine core is a process below this one; if that dies, this one exits, and the supervisor ends what is left of both and
starts them again.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
import zmq.asyncio

from sortserve.engine import messages
from sortserve.engine.config import EngineConfig
from sortserve.engine.cost_file import write_cost
from sortserve.engine.errors import NotFoundError, StartupError
from sortserve.engine.logs import configure_logging
from sortserve.engine.messages import Abort, Answer, Ask, Happened, Load, Loaded, NotLoaded, Stop, Stopped, Submit
from sortserve.engine.profile_cache import cache_folder
from sortserve.engine.protocol import EngineInfo, Event
from sortserve.engine.vllm.outlook import Outlook
from sortserve.engine.vllm.start import load, set_environment, stats_address
from sortserve.engine.vllm.warm_up import warm_up

if TYPE_CHECKING:
    from sortserve.engine.vllm.front import Front  # imports vLLM

_LOG = logging.getLogger(__name__)
_LAST_WORDS_MILLISECONDS = 2000
_SHUTDOWN_SECONDS = 3.0


async def serve(endpoint: str) -> int:
    """Bind, load what is asked for, and run until told to stop; the exit code."""
    context = zmq.asyncio.Context()
    socket, reports = context.socket(zmq.PAIR), context.socket(zmq.PULL)
    socket.set_hwm(0)
    socket.bind(endpoint)
    reports.bind(stats_address(endpoint))
    try:
        command = messages.decode_command(await socket.recv())
        assert isinstance(command, Load), "the first command is what to load"
        configure_logging(command.log_level, command.log_format)
        set_environment(command.log_level, command.log_format)
        began = time.monotonic()
        try:
            llm, info = load(command.config, stats_address(endpoint))
        except (StartupError, NotFoundError) as error:
            kind = StartupError if isinstance(error, NotFoundError) else type(error)
            await socket.send(messages.encode(NotLoaded(kind.__name__, error.message, error.param)))
            return 2
        return await _run(_Loaded(command.config, llm, info, began), socket, reports)
    finally:
        context.destroy(linger=_LAST_WORDS_MILLISECONDS)


class _Loaded:
    """An engine that was started, and what it says."""

    def __init__(self, config: EngineConfig, llm: Any, info: EngineInfo, began: float) -> None:
        from sortserve.engine.vllm.front import Front

        self.config, self.llm, self.info, self.began = config, llm, info, began
        self.says: asyncio.Queue[messages.Report] = asyncio.Queue()
        self.dead = asyncio.Event()
        self.pulses: set[asyncio.Task[None]] = set()
        self.mute = True  # while it warms up
        self.outlook = Outlook(info.ladder, config.max_step_tokens, info.kv_blocks)
        unasked = None if config.fixed_submodel is None else info.ladder.place(config.fixed_submodel)
        self.front: Front = Front(
            llm,
            info,
            self.outlook,
            config.max_running,
            config.max_waiting,
            self._tell,
            self.dead.set,
            unasked=unasked,
        )

    def _tell(self, events: list[Event]) -> None:
        if events and not self.mute:
            self.says.put_nowait(Happened(events))

    async def warm(self) -> None:
        """First requests, and the costs that they gave kept for a simulation."""
        config = self.config
        if config.warmup:
            warming = asyncio.create_task(warm_up(self.front, self.info, config.max_running, config.max_step_tokens))
            died = asyncio.create_task(self.dead.wait())
            await asyncio.wait({warming, died}, return_when=asyncio.FIRST_COMPLETED)
            died.cancel()
            if not warming.done():
                warming.cancel()
                return
            warming.result()
            self.keep()
        self.mute = False

    def keep(self) -> None:
        """The costs as they are now, as a file that `sortserve simulate --cost` reads."""
        if self.outlook.cost is None or not self.config.profile_cache:
            return
        try:
            path = cache_folder() / f"vllm-{self.info.model.replace('/', '-')}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_cost(path, self.outlook.cost, {"model": self.info.model, "backend": "vllm"})
            _LOG.info("step times kept in %s", path)
        except (OSError, RuntimeError) as error:
            _LOG.info("step times are not kept: %s", error)


async def _run(engine: _Loaded, socket: zmq.asyncio.Socket, reports: zmq.asyncio.Socket) -> int:
    """Warm up, then obey and report until told to stop, or until vLLM's engine core is dead."""

    async def say() -> None:
        while True:
            await socket.send(messages.encode(await engine.says.get()))
            engine.says.task_done()

    async def read() -> None:
        while True:
            engine.outlook.read(await reports.recv())

    helpers = [asyncio.create_task(each) for each in (say(), read())]
    died = asyncio.create_task(engine.dead.wait())
    hearing: asyncio.Task[bytes] | None = None
    try:
        await engine.warm()
        if not engine.dead.is_set():
            info = msgspec.structs.replace(engine.info, load_seconds=time.monotonic() - engine.began)
            _LOG.info(
                "vLLM has %s after %.1f s: %d sub-models, exits %s, context %d",
                info.model,
                info.load_seconds,
                len(info.ladder.entries),
                "/".join(map(str, info.ladder.exits)),
                info.max_model_len,
            )
            engine.says.put_nowait(Loaded(info))
        while True:
            hearing = asyncio.create_task(_hear(socket))
            await asyncio.wait({hearing, died, *helpers}, return_when=asyncio.FIRST_COMPLETED)
            for helper in helpers:
                if helper.done():
                    helper.result()  # raises
            if died.done():
                _LOG.error("vLLM's engine core is dead")
                return 1
            command = messages.decode_command(hearing.result())
            if isinstance(command, Stop):
                await engine.front.finish()
                engine.keep()
                engine.says.put_nowait(Stopped())
                await engine.says.join()
                engine.llm.shutdown(timeout=_SHUTDOWN_SECONDS)
                return 0
            _obey(command, engine)
    finally:
        for task in (*helpers, died, *(() if hearing is None else (hearing,))):
            task.cancel()


async def _hear(socket: zmq.asyncio.Socket) -> bytes:
    content: bytes = await socket.recv()
    return content


def _obey(command: messages.Command, engine: _Loaded) -> None:
    front, says = engine.front, engine.says
    if isinstance(command, Submit):
        front.submit(command.request)
    elif isinstance(command, Abort):
        front.abort(command.request_id)
    elif isinstance(command, Ask):
        if command.subject == "stats":
            says.put_nowait(Answer(command.number, stats=front.stats()))
        elif command.subject == "predictions":
            says.put_nowait(Answer(command.number, predictions=front.predict(command.prompt_tokens)))
        else:
            pulse = asyncio.create_task(_pulse(front, says, command.number))
            engine.pulses.add(pulse)
            pulse.add_done_callback(engine.pulses.discard)


async def _pulse(front: "Front", says: "asyncio.Queue[messages.Report]", number: int) -> None:
    """Answered by the engine core: if that hangs there is no answer, and the supervisor sees it."""
    with contextlib.suppress(Exception):  # it is dead, which `front` has told
        await front.pulse()
        says.put_nowait(Answer(number))


def _end_with_parent(directory: Path) -> None:
    """Wait for the end of standard input, and end this process's whole group: whoever holds its other end is gone."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    shutil.rmtree(directory, ignore_errors=True)  # of the sockets, which nobody else is left to remove
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main() -> int:
    """Run as a process of its own; the exit code. Signals that reach all processes of a service are not for this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    directory = Path(sys.argv[1].removeprefix("ipc://")).parent
    threading.Thread(target=_end_with_parent, args=(directory,), daemon=True).start()
    code = 1
    try:
        code = asyncio.run(serve(sys.argv[1]))
    except Exception:
        _LOG.exception("the engine process ends")
    sys.stderr.flush()
    os._exit(code)  # vLLM's threads and atexit hooks would wait for a dead engine core


if __name__ == "__main__":
    main()
