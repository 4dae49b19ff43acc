"""What must hold of every answer, whatever was sent, and of the server afterwards."""

import http.client
import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

import httpx

from sortserve.server.context import EXPOSED_HEADERS
from tests.fuzz.strategies import Exchange
from tests.server.real_server import Server

HANG_SECONDS = 60.0
SETTLE_SECONDS = 30.0
REFERENCE = {"prompt": "Once upon a time there was a king", "max_tokens": 24, "temperature": 0, "logprobs": 0}

# Every error a healthy server may answer with. A 5xx is not among them: the tests neither stop nor kill it.
ERRORS = {
    (400, "invalid_request_error"): {
        "invalid_value",
        "invalid_json",
        "invalid_body",
        "invalid_type",
        "invalid_http",
        "missing_field",
        "missing_body",
        "context_length_exceeded",
        "latency_budget_infeasible",
    },
    (404, "not_found_error"): {"not_found", "model_not_found"},
    (405, "invalid_request_error"): {"method_not_allowed"},
    (408, "invalid_request_error"): {"request_timeout"},
    (413, "invalid_request_error"): {"payload_too_large"},
    (429, "rate_limit_error"): {"overloaded"},
    (431, "invalid_request_error"): {"headers_too_large"},
}
HEADER_NAMES = {name.lower() for name in EXPOSED_HEADERS} | {
    "access-control-expose-headers",
    "allow",
    "cache-control",
    "connection",
    "content-length",
    "content-security-policy",
    "content-type",
    "date",
    "etag",
    "referrer-policy",
    "transfer-encoding",
    "vary",
    "x-accel-buffering",
    "x-content-type-options",
    "x-frame-options",
    "x-should-retry",
}
INSIDE = re.compile(rb'Traceback|site-packages|File \\?"|/sortserve/(engine|server|bundled)|\.py\b')


@dataclass(frozen=True)
class Answer:
    """One HTTP response."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def ask(url: str, exchange: Exchange) -> Answer | None:
    """Send it and read the answer; None if there is none, which only a client that was not there to the end may see."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=HANG_SECONDS) as connection:
        try:
            for piece in exchange.pieces():
                connection.sendall(piece)
            if exchange.raw is not None or exchange.sending in ("half-close", "cut"):
                connection.shutdown(socket.SHUT_WR)
            if exchange.sending == "leave":
                connection.recv(100)
                return None
            response = http.client.HTTPResponse(connection, method=exchange.method)
            response.begin()
            return Answer(response.status, tuple(response.getheaders()), response.read())
        except (http.client.HTTPException, ConnectionError):
            assert not exchange.must_answer, "the connection ended without an answer"
            return None


def check_answer(exchange: Exchange, answer: Answer) -> None:
    """The contract, for any answer."""
    names = [name.lower() for name, _ in answer.headers]
    assert set(names) <= HEADER_NAMES, f"header of the client's making: {set(names) - HEADER_NAMES}"
    assert names.count("x-request-id") == 1
    assert re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", dict(answer.headers)["x-request-id"])
    assert dict(answer.headers)["x-content-type-options"] == "nosniff"
    if exchange.path not in ("/", "/openapi.json"):
        assert INSIDE.search(answer.body) is None, answer.body[:500]
    if exchange.method == "HEAD":
        assert answer.status < 500
        return
    if answer.status == 200:
        _check_success(exchange, answer)
    else:
        _check_error(answer)


def check_server(server: Server, reference: Any) -> None:
    """It still runs, answers as before, holds nothing for requests that are over, and has logged no trace."""
    assert server.process.poll() is None, "the server has died"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert complete(server) == reference
    deadline = time.monotonic() + SETTLE_SECONDS  # what was left early is aborted within a step
    while (held := _held(server)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not held, f"held for nobody: {held}"
    check_log(server)


def check_log(server: Server, since: int = 0) -> None:
    """No exception reached the log, from line `since` on."""
    text = "".join(server.log[since:])
    assert "Traceback" not in text, text[-6000:]
    assert " ERROR " not in text, text[-6000:]


def complete(server: Server) -> Any:
    """The greedy completion that must stay the same: its text and tokens."""
    answer = httpx.post(f"{server.url}/v1/completions", json=REFERENCE, timeout=HANG_SECONDS)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["tokens"]


def _held(server: Server) -> dict[str, float]:
    gauges = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    return {name: value for name in gauges if (value := server.metric(name))}


def _check_success(exchange: Exchange, answer: Answer) -> None:
    kind = dict(answer.headers)["content-type"]
    if kind.startswith("text/event-stream"):
        events = answer.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-3:]
        for event in events[:-2]:
            told = json.loads(event.removeprefix("data: "))
            assert "error" not in told, told
    elif kind.startswith("application/json"):
        told = json.loads(answer.body, parse_constant=_no_constant)
        if exchange.path.startswith("/v1/c") and exchange.method == "POST":
            assert all(choice["finish_reason"] in ("stop", "length") for choice in told["choices"])


def _check_error(answer: Answer) -> None:
    told = json.loads(answer.body)
    assert set(told) == {"error"}
    error = told["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] in ERRORS.get((answer.status, error["type"]), set()), (answer.status, error)
    assert 0 < len(error["message"]) <= 2000
    assert error["param"] is None or len(error["param"]) <= 100


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")
