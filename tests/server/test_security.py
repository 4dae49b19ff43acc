"""What a client may not do: hold the server up, see its inside, or write into its headers and log."""

import asyncio
import http.client
import json
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any, SupportsIndex
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sortserve.engine.errors import RequestError
from sortserve.engine.logs import TextFormatter
from sortserve.engine.sampling import MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOP_STRINGS, SamplingParams
from sortserve.engine.text_stream import TextStream
from sortserve.server.app import create_app
from sortserve.server.body import MAX_JSON_DEPTH, json_depth
from sortserve.server.bounded_http import BoundedHttpProtocol
from sortserve.server.schemas import MAX_MESSAGES, MAX_SEQUENCES, ChatCompletionRequest, CompletionRequest
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, byte_tokenizer, open_client, served
from tests.server.test_errors import error_in
from tests.test_layout import ROOT

JSON = {"Content-Type": "application/json"}
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
MADE_ID = re.compile(r"req-[0-9a-f]{32}")


def raw_exchange(url: str, *pieces: bytes, close: bool = False) -> bytes:
    """Everything the server says to these bytes until it closes the connection, or hears that nothing more comes."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
        if close:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        while part := connection.recv(65536):
            said += part
        return said


def refusal_in(said: bytes) -> tuple[int, str]:
    """Status and code of a refusal, its shape checked."""
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    names = [line.partition(":")[0].lower() for line in lines[1:]]
    assert names.count("x-request-id") == names.count("content-length") == 1
    assert "connection: close" in [line.lower() for line in lines]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(lines[0].split()[1]), error["code"]


class Impatient(BoundedHttpProtocol):
    head_seconds = 0.5


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(FakeBackend(), byte_tokenizer(), ServerOptions(body_timeout=0.5))
    with served(app, Impatient) as started:
        yield started


# --- bodies


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"":'])
async def test_deep_bodies(client: httpx.AsyncClient, path: str, opening: bytes) -> None:
    field = b'{"prompt": "x", "messages": [], "tokens": [], "deep": '
    for body in (
        opening * 100_000,
        field + b"[" * 100_000 + b"]" * 100_000 + b"}",
        field + b"[" * 70 + b"]" * 70 + b"}",
    ):
        answer = await client.post(path, content=body, headers=JSON)
        assert (answer.status_code, error_in(answer)["code"]) == (400, "invalid_json")
        assert f"deeper than {MAX_JSON_DEPTH}" in error_in(answer)["message"]


async def test_brackets_in_a_text_are_no_depth(client: httpx.AsyncClient) -> None:
    for prompt in ("[{" * 30, '"]}' * 10 + "[" * 60, "\\" * 7 + '"' + "[" * 60):
        answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, "x": [[], [[]]] * 50})
        assert answer.status_code == 200, answer.text


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(
    st.recursive(
        st.text(alphabet='[]{}"\\,x', max_size=6) | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[{"\\', max_size=3), inner),
    )
)
def test_depth_is_that_of_the_parsed_value(value: Any) -> None:
    assert json_depth(json.dumps(value).encode()) == depth_of(value)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "\xff", "max_tokens": 1}', 400),
        ('{"prompt": "x", "max_tokens": 1}'.encode("utf-16"), 400),
        ('{"prompt": "x", "max_tokens": 1}'.encode("utf-16-le"), 400),
        (b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}', 200),  # a BOM, which RFC 8259 lets a parser ignore
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "x", "max_tokens": 1, "unknown": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "x", "max_tokens": 1, "temperature": ' + b"9" * 4000 + b"}", 400),
        (b'{"prompt": "x", "max_tokens": 1, "temperature": NaN}', 400),
        (b'{"prompt": "x", "max_tokens": 1, "logit_bias": {"1": Infinity}}', 400),
        (b'{"prompt": "x", "max_tokens": 1, "stop": "\\ud800"}', 400),
        (b'{"prompt": "\\ud800", "max_tokens": 1}', 400),
        (b'{"prompt": "x", "max_tokens": 1, "user": "\\ud800"}', 200),
        (b'{"prompt": "\\u0000", "max_tokens": 1}', 200),
    ],
)
async def test_odd_bodies(client: httpx.AsyncClient, body: bytes, status: int) -> None:
    answer = await client.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    if status != 200:
        error_in(answer)


async def test_of_equal_keys_the_last_counts(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    """As in Python and JavaScript; SECURITY.md says so to whoever filters bodies in front of this server."""
    await client.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1, "max_tokens": 2}', headers=JSON)
    assert backend.requests[0].sampling.max_tokens == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": [True] * 10_000},
        {"prompt": ["x"] * 10_000},
        {"prompt": [[1]] * 10_000},
        {"prompt": [1] * 10_000 + ["x"]},
        {"prompt": [[None] * 10_000]},
        {"prompt": "x", "stop": [1] * 10_000},
    ],
)
def test_validation_ends_at_the_first_wrong_item(wrong: dict[str, Any]) -> None:
    """An error was made for each: a body of 2 MB kept the event loop from everybody else for 16 s."""
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(wrong)
    assert caught.value.error_count() <= 4  # one per kind that a prompt may have


def test_lists_are_bounded() -> None:
    with pytest.raises(RequestError, match=f"at most {MAX_LOGIT_BIAS}"):
        CompletionRequest.model_validate({"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(100_000)))})
    message = {"role": "user", "content": "x"}
    ChatCompletionRequest.model_validate({"messages": [message] * MAX_MESSAGES})
    with pytest.raises(ValidationError, match=f"at most {MAX_MESSAGES}"):
        ChatCompletionRequest.model_validate({"messages": [message] * (MAX_MESSAGES + 1)})


async def test_answers_of_one_request_are_bounded(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for prompts, choices in ((MAX_SEQUENCES + 1, 1), (MAX_SEQUENCES // 16 + 1, 16)):
        answer = await client.post("/v1/completions", json={"prompt": ["x"] * prompts, "n": choices, "max_tokens": 1})
        assert answer.status_code == 400
        assert error_in(answer)["param"] == "prompt"
    assert backend.requests == []


@pytest.mark.parametrize("chat", [False, True])
async def test_a_text_that_cannot_fit_is_not_tokenized(
    client: httpx.AsyncClient, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sortserve.engine.text.Tokenizer.encode", lambda *_: pytest.fail("it was tokenized"))
    text = "a" * 100_000
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    answer = await client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert (answer.status_code, error_in(answer)["code"]) == (400, "context_length_exceeded")


async def test_another_content_type(client: httpx.AsyncClient) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        answer = await client.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert (answer.status_code, error_in(answer)["code"]) == (400, "invalid_body"), kind


# --- connections


def test_a_body_that_stops_is_a_408(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    whole = b"Content-Length: 100\r\n\r\n"
    for begun in (whole, whole + b'{"prompt"', b"Transfer-Encoding: chunked\r\n\r\n5\r\n[1,2,\r\n"):
        said = raw_exchange(url, head + begun)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert b"\r\nretry-after: 1\r\n" in said.lower()


def test_headers_that_do_not_end_are_a_408(url: str) -> None:
    assert refusal_in(raw_exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\n")) == (408, "request_timeout")
    assert raw_exchange(url) == b""  # nothing was asked
    asked = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    first, _, second = raw_exchange(url, asked + asked[:-2]).partition(b'{"status":"ok"}')
    assert first.startswith(b"HTTP/1.1 200 ")
    assert refusal_in(second) == (408, "request_timeout")


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        (b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404, "not_found"),
        (b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 66_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 129 + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 66_000, 431, "headers_too_large"),  # and no end
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nX-Request-Id: a\r\n b\r\n\r\n", 400, "invalid_http"),
    ],
)
def test_heads_are_bounded_and_refused_in_shape(url: str, lines: bytes, status: int, code: str) -> None:
    said = raw_exchange(url, lines)
    assert len(said) < 70_000
    assert refusal_in(said.replace(b"connection: keep-alive", b"connection: close")) == (status, code)


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
    ],
)
def test_a_request_whose_end_is_unclear_is_refused(url: str, framing: bytes) -> None:
    """Of two servers that disagree on where a body ends, one can be made to serve a request hidden in it."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n"
    said = raw_exchange(url, head + b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n", close=True)
    assert refusal_in(said) == (400, "invalid_http")


# --- headers and log lines


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([b"X-Request-Id", b"X-Submodel", b"X-Latency-Budget-Ms"]))
def test_no_header_comes_back_as_another(url: str, value: bytes, name: bytes) -> None:
    """Any bytes in a header that is echoed or quoted: one id comes back, the one sent or one made here, nothing else."""
    body = b'{"prompt": "x", "max_tokens": 1}'
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: x", b"Connection: close", b"Content-Type: application/json"]
    lines += [b"Content-Length: %d" % len(body), name + b": " + value, b"", body]
    said = raw_exchange(url, b"\r\n".join(lines), close=True)
    if not said:  # bytes of the client's own end its headers early, and then it is gone
        return
    head = said.partition(b"\r\n\r\n")[0].decode("ascii")
    fields = [line.partition(": ") for line in head.split("\r\n")[1:]]
    given_ids = [text for field, _, text in fields if field.lower() == "x-request-id"]
    assert len(given_ids) == 1
    usable = re.fullmatch(rb"[A-Za-z0-9._:/+=@-]{1,128}", value.lstrip(b" \t"))
    if usable and name == b"X-Request-Id":
        assert given_ids[0].encode() == value.lstrip(b" \t")
    else:
        assert MADE_ID.fullmatch(given_ids[0])
    assert not any("evil" in field.lower() for field, _, _ in fields)


@pytest.mark.parametrize(
    "forged", ["a\r\nX-Evil: 1", "a\nINFO forged", "a status=200", "é", "\x1b[2J", "a" * 129, "\ud800"]
)
async def test_no_line_of_the_log_is_the_clients(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, forged: str
) -> None:
    caplog.set_level(logging.DEBUG, "sortserve")
    content = json.dumps({"prompt": "x", "request_id": forged, forged: 1, "user": forged, "model": forged})
    answer = await client.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code in (400, 404)
    assert MADE_ID.fullmatch(answer.headers["X-Request-Id"])
    path = "/" + quote(forged, errors="replace")[:300]
    await client.get(path, headers=[(b"X-Request-Id", forged.encode("utf-8", "replace"))])
    lines = [TextFormatter().format(record) for record in caplog.records if record.name.startswith("sortserve")]
    assert len(lines) >= 2
    for line in lines:
        assert line.isprintable(), line
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert unquoted.count("status=") == 1 or "ignored unknown" in line, line


async def test_every_answer_has_the_security_headers(client: httpx.AsyncClient) -> None:
    stream = {"prompt": "x", "max_tokens": 1, "stream": True}
    for answer in (
        await client.get("/health"),
        await client.get("/nowhere"),
        await client.get("/openapi.json"),
        await client.post("/v1/completions", content=b"{"),
        await client.post("/v1/completions", json=stream),
        await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}),
    ):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


# --- what answers may say


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_says_nothing_of_the_inside(stream: bool) -> None:
    async with open_client(FakeBackend(raise_after=1)) as client:
        answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "stream": stream})
    assert answer.status_code == (200 if stream else 500)
    for word in ("secret detail", "RuntimeError", "Traceback", ".py"):
        assert word not in answer.text


async def test_a_model_that_cannot_be_loaded_names_no_path() -> None:
    """Its error names files of the server; it is for the log."""
    async with open_client(FakeBackend(load_error=RuntimeError("/srv/models/secret is broken"))) as client:
        for path in ("/ready", "/health", "/v1/models"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert "secret" not in answer.text


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CompletionRequest.model_fields)), st.sampled_from(["x", "\ud800", "\r\n", "'\"<>"]))
def test_what_was_sent_does_not_come_back_at_length(field: str, unit: str) -> None:
    async def ask() -> httpx.Response:
        async with open_client(FakeBackend()) as client:
            content = json.dumps({"prompt": "x", field: unit * 50_000})
            return await client.post("/v1/completions", content=content, headers=JSON)

    answer = asyncio.run(ask())
    if answer.status_code != 200:
        assert len(answer.content) < 4000
        error_in(answer)


# --- cost of what a client chooses


class Counting(str):
    """Counts how often one of its characters is looked at."""

    __slots__ = ()
    looks = 0

    def __getitem__(self, place: SupportsIndex | slice) -> str:
        Counting.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("a" * 1023 + "b", "a" * 8000),
        ("a" * 1023 + "b", ("a" * 1023 + "x") * 8),
        ("ab" * 511 + "ac", "ab" * 4000),
        ("ab" * 511 + "ac", ("ab" * 511 + "x") * 8),
    ],
)
def test_a_stop_string_costs_a_few_looks_per_character(stop: str, text: str) -> None:
    """Comparing anew at each character took up to 1,024 of them: 16 such strings held a step up for milliseconds."""
    Counting.looks = 0
    stream = TextStream(byte_tokenizer(), [Counting(stop)])
    setting_up = Counting.looks
    for token in text.encode():
        stream.push(token)
    assert setting_up <= 6 * len(stop)
    assert Counting.looks - setting_up <= 3 * len(text)


def test_stop_strings_are_bounded() -> None:
    SamplingParams(stop=("a" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS)
    for stop in (("a" * (MAX_STOP_CHARS + 1),), ("a",) * (MAX_STOP_STRINGS + 1), ("",), ("a\ud800",)):
        with pytest.raises(RequestError, match="stop"):
            SamplingParams(stop=stop)


def test_http_client_reads_a_refusal(url: str) -> None:
    """A refusal below the app is whole HTTP: an ordinary client reads it."""
    address = httpx.URL(url)
    connection = http.client.HTTPConnection(address.host, address.port or 0, timeout=30)
    connection.request("GET", "/health", headers={"A": "a" * 65_600})
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Content-Type")) == (431, "application/json")
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
    connection.close()


def test_the_tests_that_security_md_names_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"\b(test_\w+)(?!\w|\.py)", text))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in written} == set()
    paths = re.findall(r"`((?:tests|\.ci)/[\w./]+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
