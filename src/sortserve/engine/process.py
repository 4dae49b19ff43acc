"""The engine process: `python -m sortserve.engine.process SOCKET`, started by `connection.py`.

One thread loads and steps; between two steps it reads what was asked. OpenMP keeps a team of workers per calling thread,
and once two threads have teams, more than there are cores, its barriers sleep instead of spinning (a step of the
bundled model took 18 ms instead of 3).

The process ends by itself when the one that started it is gone: then its standard input is at its end.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import zmq

from sortserve.engine import messages
from sortserve.engine.engine import Engine
from sortserve.engine.errors import SortServeError, StartupError
from sortserve.engine.logs import configure_logging
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
from sortserve.engine.protocol import Event, FailedEvent

_LOG = logging.getLogger(__name__)
_LAST_WORDS_SECONDS = 2.0  # for what was said last to leave


class EngineLoop:
    """Steps an engine as long as it has work, and obeys the other process between two steps."""

    def __init__(self, engine: Engine, socket: "zmq.Socket[bytes]") -> None:
        self._engine = engine
        self._socket = socket

    def run(self) -> None:
        """Return when told to stop. Raises what a step raises: then nothing of the engine can be trusted any more."""
        scheduler = self._engine.scheduler
        while True:
            if self._socket.poll(0 if scheduler.has_work else None):
                command = messages.decode_command(self._socket.recv())
                if isinstance(command, Stop):
                    return
                self._obey(command)
            else:
                self._say(self._engine.step())

    def _obey(self, command: messages.Command) -> None:
        scheduler = self._engine.scheduler
        if isinstance(command, Submit):
            try:
                scheduler.add(command.request)
            except SortServeError as error:
                self._say([FailedEvent.of(command.request.request_id, error)])
        elif isinstance(command, Abort):
            event = scheduler.abort(command.request_id, time.monotonic())
            self._say([] if event is None else [event])
        elif isinstance(command, Ask):
            self._socket.send(messages.encode(self._answer(command)))
        else:
            raise AssertionError(f"{type(command).__name__} is not expected while the engine runs")

    def _answer(self, question: Ask) -> Answer:
        if question.subject == "stats":
            return Answer(question.number, stats=self._engine.stats())
        if question.subject == "predictions":
            return Answer(question.number, predictions=self._engine.predict(question.prompt_tokens))
        return Answer(question.number)

    def _say(self, events: list[Event]) -> None:
        if events:
            self._socket.send(messages.encode(Happened(events)))


def serve_engine(endpoint: str) -> int:
    """Bind, load what is asked for, and run until told to stop; the exit code."""
    threading.Thread(target=_end_with_parent, args=(Path(endpoint.removeprefix("ipc://")).parent,), daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)  # never blocks: what waits is bounded by the tokens of the requests that were accepted
        socket.linger = int(_LAST_WORDS_SECONDS * 1e3)
        socket.bind(endpoint)
        command = messages.decode_command(socket.recv())
        assert isinstance(command, Load), "the first command is what to load"
        configure_logging(command.log_level, command.log_format)
        try:
            engine = Engine.load(command.config, lambda done, of: socket.send(messages.encode(Loading(done, of))))
        except StartupError as error:
            socket.send(messages.encode(NotLoaded(type(error).__name__, error.message, error.param)))
            return 2
        gc.collect()
        gc.freeze()  # what was loaded stays: it need not be looked through for garbage again and again
        socket.send(messages.encode(Loaded(engine.info)))
        try:
            EngineLoop(engine, socket).run()
            engine.scheduler.check_integrity()
        except Exception:
            _LOG.exception("the engine failed")
            return 1
        socket.send(messages.encode(Stopped()))
        return 0


def _end_with_parent(directory: Path) -> None:
    """Wait for the end of standard input, and exit: the process that holds its other end is gone, however it went."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    shutil.rmtree(directory, ignore_errors=True)  # of the socket, which nobody else is left to remove
    os._exit(1)


def main() -> int:
    """Run as a process of its own; the exit code. Whoever ends the server tells the server, which ends the engine once
    its requests are answered, so signals that reach all processes of a group or service are not for this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return serve_engine(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
