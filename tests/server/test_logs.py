"""Log lines: the two formats, the request's line, and what must never be in them."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine import logs
from sortserve.engine.logs import JsonFormatter, TextFormatter
from sortserve.server.logs import MAX_PROMPT_CHARS
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, byte_tokenizer, open_client

SRC = Path(__file__).resolve().parents[2] / "src"
TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [\w.]+: .*")


def record_of(message: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("sortserve.server", logging.INFO, __file__, 1, message, (), None)
    made.fields = fields
    return made


def json_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What the server logged, each line parsed."""
    return [json.loads(line) for line in caplog.text.splitlines() if '"sortserve.' in line]


@pytest.fixture
def as_json(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sortserve")
    caplog.handler.setFormatter(JsonFormatter())
    return caplog


@pytest.fixture
def as_text(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sortserve")
    caplog.handler.setFormatter(TextFormatter())
    return caplog


# --- formats


@given(st.text(), st.text())
def test_nothing_forges_a_line(message: str, value: str) -> None:
    """Whatever a message or a field holds, an event without a trace is one line, and the JSON gives it back."""
    made = record_of(message.replace("%", ""), path=value)
    for text in (TextFormatter().format(made), JsonFormatter().format(made)):
        assert len(text.splitlines()) == 1
        assert "\x1b" not in text
        text.encode("utf-8")
    told = json.loads(JsonFormatter().format(made))
    assert (told["message"], told["path"]) == (made.getMessage(), value)


def test_traces_stay_off_the_margin() -> None:
    made = record_of("it failed")
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z INFO sortserve.server: forged\x1b[31m")
    except ValueError:
        made.exc_info = sys.exc_info()
    first, *trace = TextFormatter().format(made).splitlines()
    assert TEXT_LINE.fullmatch(first)
    assert trace
    assert all(line.startswith("    ") and "\x1b" not in line for line in trace)
    told = json.loads(JsonFormatter().format(made))
    assert told["message"] == "it failed"
    assert "ValueError: x\n2026" in told["exception"]


def test_fields_and_time() -> None:
    made = record_of("request", method="GET", path="/a b", status=200, ms=1.5, met=True, budget_ms=None)
    made.created = 1_700_000_000.25
    assert TextFormatter().format(made) == (
        '2023-11-14T22:13:20.250Z INFO sortserve.server: request method=GET path="/a b" status=200 ms=1.5 met=true'
    )
    told = json.loads(JsonFormatter().format(made))
    assert (told["ts"], told["level"], told["logger"]) == ("2023-11-14T22:13:20.250Z", "info", "sortserve.server")
    assert (told["ms"], told["met"], told["budget_ms"]) == (1.5, True, None)
    assert "request_id" not in told


CONFIGURED = """
import asyncio, logging, sys, warnings
from sortserve.engine.logs import configure_logging, request_id
assert not {"fastapi", "uvicorn", "torch"} & set(sys.modules)
configure_logging("info", sys.argv[1])
logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
warnings.warn("old\\nthing", UserWarning)
async def work():
    logging.getLogger("any").info("inside")
async def serve():
    request_id.set("r-7")
    await asyncio.create_task(work())
asyncio.run(serve())
logging.getLogger("any").debug("quiet")
"""


@pytest.mark.parametrize("log_format", logs.LOG_FORMATS)
def test_configured_process(log_format: str) -> None:
    """Other libraries' lines and warnings have the format; nothing of the HTTP side is needed for it."""
    ran = subprocess.run(
        [sys.executable, "-c", CONFIGURED, log_format], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)}
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.splitlines()
    assert len(lines) == 3
    if log_format == "json":
        told = [json.loads(line) for line in lines]
        assert [line["logger"] for line in told] == ["uvicorn.error", "py.warnings", "any"]
        assert "old\nthing" in told[1]["message"]
        assert [line.get("request_id") for line in told] == [None, None, "r-7"]
    else:
        assert all(TEXT_LINE.fullmatch(line) for line in lines)
        assert lines[2].endswith("any: inside request_id=r-7")


# --- the request's line


async def test_request_line(client: httpx.AsyncClient, as_json: pytest.LogCaptureFixture) -> None:
    ask = {"prompt": "say", "latency_budget_ms": 60_000, "made_up": 1, "SECRET\n": 1}
    await client.post("/v1/completions", json=ask, headers={"X-Request-Id": "r-1"})
    await client.get("/health")
    unknown, line = json_lines(as_json)
    assert (unknown["message"], unknown["request_id"]) == ("ignored unknown fields: made_up, ?", "r-1")
    assert line["ms"] >= 0
    told = {name: line[name] for name in line if name not in ("ts", "ms", "job")}
    assert told == {
        "level": "info",
        "logger": "sortserve.server",
        "message": "request",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "submodel": "d4",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 11,
        "budget_ms": 60_000.0,
        "met": True,
        "request_id": "r-1",
    }


async def test_refused_request_has_its_line(client: httpx.AsyncClient, as_json: pytest.LogCaptureFixture) -> None:
    await client.post("/v1/completions", json={"prompt": "", "request_id": "from-body"})
    await client.get("/v1/models/x%0A2026-01-01T00:00:00.000Z")
    refused, missing = json_lines(as_json)
    assert (refused["status"], refused["request_id"], refused["submodel"]) == (400, "from-body", "none")
    assert "job" not in refused
    assert (missing["status"], missing["path"]) == (404, "/v1/models/x\n2026-01-01T00:00:00.000Z")


async def test_exceptions_carry_the_request(
    client: httpx.AsyncClient, as_json: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sortserve.server.routes._models", lambda state: 1 / 0)
    await client.get("/v1/models", headers={"X-Request-Id": "r-2"})
    failed = json_lines(as_json)[0]
    assert (failed["level"], failed["request_id"]) == ("error", "r-2")
    assert "ZeroDivisionError" in failed["exception"]


async def test_lines_of_tasks_that_a_request_started(as_json: pytest.LogCaptureFixture) -> None:
    """The back end is read by a task of its own."""
    async with open_client(FakeBackend(raise_after=1)) as client:
        await client.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "r-3"})
    raised = [line for line in json_lines(as_json) if "exception" in line]
    assert raised
    assert {line["request_id"] for line in raised} == {"r-3"}


@pytest.mark.parametrize("chat", [False, True])
async def test_prompts_and_answers_stay_out(chat: bool, as_text: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(answer=tuple(b"ANSWER"), submodels=("d4", "d2"))
    secret: dict[str, Any] = {"messages": [{"role": "user", "content": "SECRET"}]} if chat else {"prompt": "SECRET"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    as_text.set_level(logging.DEBUG)
    async with open_client(backend) as client:
        for extra in ({}, {"stream": True}, {"stop": "SECRET", "made_up": "SECRET"}, {"max_tokens": -1}):
            await client.post(path, json=secret | extra)
    assert as_text.text.count("request method=POST") == 4
    assert "SECRET" not in as_text.text
    assert "ANSWER" not in as_text.text


async def test_prompts_where_asked_for(as_json: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(answer=tuple(b"ANSWER"))
    async with open_client(backend, ServerOptions(log_prompts=True)) as client:
        await client.post("/v1/completions", json={"prompt": ["one\ntwo", "hi"], "max_tokens": 2})
        await client.post("/v1/completions", json={"prompt": [104, 105], "max_tokens": 2})
        await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        await client.post("/v1/completions", json={"prompt": "x" * 126, "max_tokens": 2})
    prompts = [line["prompts"] for line in json_lines(as_json) if line["message"] == "prompt"]
    assert prompts == [["one\ntwo", "hi"], ["hi"], ["user: hi\nassistant:"], ["x" * 126]]
    assert "ANSWER" not in as_json.text


def test_shown_prompts_are_short() -> None:
    from sortserve.engine.sampling import SamplingParams
    from sortserve.server.budget_headers import Terms
    from sortserve.server.logs import prompt_fields
    from sortserve.server.prepare import Job
    from sortserve.server.prompts import Prompt

    prompts = tuple(Prompt(tuple(b"y" * 5000), text) for text in ("x" * 5000, None) for _ in range(8))
    job = Job("completions", "id", 0, "m", prompts, 1, SamplingParams(), Terms(), 0.0, False)
    told = prompt_fields(job, byte_tokenizer())
    assert told["num_prompts"] == 16
    assert [len(text) for text in told["prompts"]] == [MAX_PROMPT_CHARS] * 8
