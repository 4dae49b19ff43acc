"""Log lines of both processes, as text or JSON. One event is one line, and nothing that a client sent can forge one.

A line carries the id of the HTTP request it was written for, if it was written while one was served, and whatever its
writer gave in `extra={"fields": {...}}`: keys of the JSON object, `key=value` in text.
"""

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, get_args

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that the running task serves; empty outside of one. Tasks that a request starts inherit it."""

# what starts a new line, moves the cursor or turns the direction of writing, in a terminal or a log viewer
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = re.compile(r"[A-Za-z0-9._:/+@-]+")


def configure_logging(level: int | str, log_format: LogFormat) -> None:
    """Write the log of this process, with the warnings of Python, to standard error. `level` as in `logging`.

    Does nothing where the process has log handlers already.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper() if isinstance(level, str) else level, handlers=[handler])
    logging.captureWarnings(True)


def configured_format() -> LogFormat:
    """The format that this process writes its log in, for one that it starts."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    return "json" if any(isinstance(formatter, JsonFormatter) for formatter in formatters) else "text"


class TextFormatter(logging.Formatter):
    """`<time> <level> <logger>: <message> key=value ... request_id=<id>`; a trace follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. Only a trace has more than one, and none of those starts at the margin."""
        fields = {name: value for name, value in _fields(record).items() if value is not None}
        told = "".join(f" {name}={_value(value)}" for name, value in fields.items())
        line = f"{_time(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}{told}"
        trace = "".join(f"\n    {_one_line(part)}" for part in _trace(self, record).splitlines())
        return line + trace


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `ts`, `level`, `logger`, `message`, `request_id`, fields, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, in ASCII."""
        told: dict[str, Any] = {
            "ts": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        trace = _trace(self, record)
        if trace:
            told["exception"] = trace
        return json.dumps(told, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the writer gave, and the request's id at the end."""
    fields = dict(getattr(record, "fields", {}))
    current = request_id.get()
    return {**fields, "request_id": current} if current else fields


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _value(value: object) -> str:
    """A value of a field: bare where it cannot be taken for anything else, else as JSON."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value, default=str)


def _one_line(text: str) -> str:
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
