"""What the HTTP process and the engine process say to each other: MessagePack over one ZeroMQ pair, nothing else.

Commands go to the engine, reports come back, both in order. Decoding checks every type; nothing is ever unpickled.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from sortserve.engine.config import EngineConfig
from sortserve.engine.logs import LogFormat
from sortserve.engine.protocol import Data, EngineInfo, EngineStats, Event, GenerateRequest, Prediction

Subject = Literal["stats", "predictions", "pulse"]
"""What can be asked between two steps. A pulse is answered with nothing: it proves that steps end."""


class Load(Data, frozen=True):
    """First command: what to load, and what to log while that lasts and after."""

    config: EngineConfig
    log_level: int
    log_format: LogFormat = "text"


class Submit(Data, frozen=True):
    """Take a request up."""

    request: GenerateRequest


class Abort(Data, frozen=True):
    """Nobody listens to this request any more."""

    request_id: str


class Expect(Data, frozen=True):
    """A request is being read: be awake for it."""


class Ask(Data, frozen=True):
    """A question; `number` comes back with the answer."""

    number: int
    subject: Subject
    prompt_tokens: int = 0  # for predictions


class Stop(Data, frozen=True):
    """Last command: end the process."""


class Loading(Data, frozen=True):
    """How far loading is."""

    layers_loaded: int
    num_layers: int


class Loaded(Data, frozen=True):
    """Loaded and warmed up: requests are taken from now on."""

    info: EngineInfo


class NotLoaded(Data, frozen=True):
    """The engine cannot start; the process ends. The fields are those of an error of `errors.py`."""

    error: str
    message: str
    param: str | None = None


class Happened(Data, frozen=True):
    """The events of a step."""

    events: list[Event]


class Stopped(Data, frozen=True):
    """The answer to Stop, after the last events."""


class Answer(Data, frozen=True):
    """The answer to a question; only the field asked for is set."""

    number: int
    stats: EngineStats | None = None
    predictions: dict[str, Prediction] | None = None


Command = Load | Submit | Abort | Expect | Ask | Stop
Report = Loading | Loaded | NotLoaded | Happened | Answer | Stopped


def _encode_path(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value)} does not cross")


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind} does not cross")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_path)
_COMMANDS = msgspec.msgpack.Decoder(Command, dec_hook=_decode_path)
_REPORTS = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """The bytes of a message."""
    return _ENCODER.encode(message)


def decode_command(content: bytes) -> Command:
    """A command from its bytes. Raises msgspec.MsgspecError if they are none."""
    command: Command = _COMMANDS.decode(content)
    return command


def decode_report(content: bytes) -> Report:
    """A report from its bytes. Raises msgspec.MsgspecError if they are none."""
    report: Report = _REPORTS.decode(content)
    return report
