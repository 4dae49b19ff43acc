"""Every answer that is not 2xx has the contract's shape, and says what a client should do."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.errors import (
    BudgetInfeasibleError,
    EngineFailedError,
    RequestError,
    SortServeError,
    StartupError,
)
from sortserve.engine.protocol import FailedEvent
from sortserve.server.errors import error_response
from sortserve.server.schemas import ChatCompletionRequest, CompletionRequest
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import MAX_MODEL_LEN, FakeBackend, open_client, state_of

TYPES = {"invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"}
ASK = {"prompt": "x", "max_tokens": 2}


def error_in(answer: httpx.Response) -> dict[str, Any]:
    """The error object, its shape checked."""
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in TYPES
    assert error["message"]
    assert error["code"]
    assert "X-Request-Id" in answer.headers
    return error


def classes(kind: type[SortServeError] = SortServeError) -> list[type[SortServeError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in classes(below))]


@pytest.mark.parametrize("kind", classes())
def test_every_class_crosses_the_engine_boundary(kind: type[SortServeError]) -> None:
    error = FailedEvent("r", kind.__name__, "why", "field").as_error()
    assert type(error) is kind
    response = error_response(error)
    assert response.status_code == kind.status
    body = json.loads(bytes(response.body))["error"]
    assert body == {"message": "why", "type": kind.kind, "param": "field", "code": kind.code}
    assert body["type"] in TYPES
    assert (kind.status >= 500) == (kind.kind == "server_error")


def test_unknown_class_is_our_bug() -> None:
    assert FailedEvent("r", "ValueError", "why").as_error().status == 500


async def refusal(error: str, body: dict[str, Any] | None = None) -> httpx.Response:
    async with open_client(FakeBackend(refuse=FailedEvent("", error, "no", "p"))) as client:
        return await client.post("/v1/completions", json=ASK | (body or {}))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        ("BudgetInfeasibleError", 400, "latency_budget_infeasible", {"x-should-retry": "false"}),
        ("OverloadedError", 429, "overloaded", {"Retry-After": "1", "X-Dropped-Reason": "rejected-saturated"}),
        ("OverloadedError", 429, "overloaded", {"retry-after-ms": "1000"}),
        ("DrainingError", 503, "draining", {"Retry-After": "1", "X-Dropped-Reason": "rejected-shutting-down"}),
        ("EngineFailedError", 503, "engine_failed", {"Retry-After": "1"}),
    ],
)
async def test_refusals(stream: bool, error: str, status: int, code: str, headers: dict[str, str]) -> None:
    answer = await refusal(error, {"stream": stream})
    assert answer.status_code == status
    assert error_in(answer)["code"] == code
    assert headers.items() <= {name: answer.headers.get(name) for name in headers}.items()
    assert ("x-should-retry" in answer.headers) == (error == BudgetInfeasibleError.__name__)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/version/", 404, "not_found"),  # not a redirect
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/fake:d3", 404, "model_not_found"),
    ],
)
async def test_paths(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert error_in(answer)["code"] == code


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "missing_body"),
        (b"\xff\xfe", "invalid"),
        (b"[" * 100_000, "invalid"),
        (b'"text"', "invalid_body"),
        (b"[]", "invalid_body"),
        (b"null", "invalid_body"),
    ],
)
async def test_bad_bodies(client: httpx.AsyncClient, content: bytes, code: str) -> None:
    answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_in(answer)["type"] == "invalid_request_error"


async def test_wrong_content_type_says_so(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in error_in(answer)["message"]


NAN = float("nan")
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["x"] * 1025}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
    ({"temperature": NAN}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": NAN}}, "logit_bias"),
    ({"priority": 1}, "priority"),
    ({"request_id": "a\nb"}, "request_id"),
    ({"request_id": ""}, "request_id"),
    ({"suffix": "end"}, "suffix"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"latency_budget_ms": True}, "latency_budget_ms"),
    ({"latency_budget_ms": NAN}, "latency_budget_ms"),
    ({"quality_floor": NAN}, "quality_floor"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("change", "param"), FIELDS, ids=lambda value: str(value)[:40])
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, backend: FakeBackend, change: dict[str, Any], param: str
) -> None:
    content = json.dumps({**ASK, **change})  # with NaN as JavaScript and Python write it
    answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_in(answer)["param"] == param
    assert backend.requests == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"echo": True}, "echo"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_bad_chat_fields(client: httpx.AsyncClient, change: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **change}
    answer = await client.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert error_in(answer)["param"] == param


async def test_no_chat_template() -> None:
    async with open_client(FakeBackend(), template=None) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 400
    assert "no chat template" in error_in(answer)["message"]


@pytest.mark.parametrize("length", [MAX_MODEL_LEN - 1, MAX_MODEL_LEN, 5000])
async def test_over_long_prompt_names_both_numbers_and_the_limit(client: httpx.AsyncClient, length: int) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "x" * length, "max_tokens": 2})
    error = error_in(answer)
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert all(f" {number}" in error["message"] for number in (length, 2, MAX_MODEL_LEN))
    messages = [{"role": "user", "content": "x" * length}]
    answer = await client.post("/v1/chat/completions", json={"messages": messages})
    assert error_in(answer)["code"] == "context_length_exceeded"


async def test_unknown_models_list_what_there_is(client: httpx.AsyncClient) -> None:
    for model in ("other", "fake:d3", "fake:", "", "\ud800"):
        content = json.dumps(ASK | {"model": model})
        answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        error = error_in(answer)
        if model == "\ud800":
            assert answer.status_code in (400, 404)
            continue
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "fake, fake:d2, fake:d4-w50, fake:d4" in error["message"]


async def test_body_limit() -> None:
    async with open_client(FakeBackend(), ServerOptions(max_body_bytes=100)) as client:
        declared = await client.post("/v1/completions", json={"prompt": "x" * 100})

        async def chunks() -> Any:
            for _ in range(20):
                yield b"x" * 10

        streamed = await client.post("/v1/completions", content=chunks())
    for answer in (declared, streamed):
        assert answer.status_code == 413
        assert "100 bytes" in error_in(answer)["message"]


async def test_keys() -> None:
    async with open_client(FakeBackend(), ServerOptions(api_keys=("one", "two"))) as client:
        for headers in (
            [],
            [("Authorization", "Bearer three")],
            [("Authorization", "Basic one")],
            [("Authorization", "Bearer")],
            [("Authorization", "Bearer \xe9".encode("latin-1").decode("latin-1"))],
            [("Authorization", "Bearer one"), ("Authorization", "Bearer one")],
        ):
            encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
            answer = await client.get("/v1/models", headers=encoded)
            assert answer.status_code == 401, headers
            assert error_in(answer)["type"] == "authentication_error"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for key in ("one", "two"):
            assert (await client.get("/v1/models", headers={"Authorization": f"bearer {key}"})).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200
        assert (await client.options("/v1/completions")).status_code != 401
        assert (await client.post("/v1/completions", content=b"x" * 10_000_000)).status_code == 401


async def test_loading_then_ready() -> None:
    gate = asyncio.Event()
    async with open_client(FakeBackend(may_load=gate), loaded=False) as client:
        for path in ("/ready", "/v1/models", "/v1/submodels"):
            answer = await client.get(path)
            assert (answer.status_code, error_in(answer)["code"]) == (503, "loading")
        answer = await client.post("/v1/completions", json=ASK)
        assert (answer.status_code, error_in(answer)["code"]) == (503, "loading")
        assert "Retry-After" in answer.headers
        assert (await client.get("/health")).status_code == 200
        assert "sortserve_model_ready" in (await client.get("/metrics")).text
        gate.set()
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0)
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200


@pytest.mark.parametrize("error", [StartupError("weights are missing"), RuntimeError("bug")])
async def test_load_failure(error: Exception) -> None:
    async with open_client(FakeBackend(load_error=error)) as client:
        assert state_of(client).failure is error
        for path in ("/ready", "/health"):
            assert (await client.get(path)).status_code == 503
        answer = await client.post("/v1/completions", json=ASK)
        assert (answer.status_code, error_in(answer)["code"]) == (503, "engine_failed")


async def test_dead_engine(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.alive = False
    for path in ("/health", "/ready"):
        answer = await client.get(path)
        assert (answer.status_code, error_in(answer)["code"]) == (503, "engine_failed")


async def test_draining(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.delay = 0.02
    running = asyncio.create_task(client.post("/v1/completions", json=ASK))
    while not backend.running:
        await asyncio.sleep(0)
    draining = asyncio.create_task(state_of(client).drain())
    await asyncio.sleep(0)
    for answer in (await client.get("/ready"), await client.post("/v1/completions", json=ASK)):
        assert (answer.status_code, error_in(answer)["code"]) == (503, "draining")
        assert answer.headers["X-Dropped-Reason"] == "rejected-shutting-down"
    assert (await client.get("/health")).status_code == 200
    assert (await running).status_code == 200
    await draining
    assert backend.drained == [55.0]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"fail_after": 1}, 503, "engine_failed"),
        ({"vanish_after": 1}, 503, "engine_failed"),
        ({"raise_after": 1}, 500, "internal_error"),
        ({"raise_after": 0}, 500, "internal_error"),
    ],
)
async def test_failure_under_way(fault: dict[str, int], status: int, code: str) -> None:
    async with open_client(FakeBackend(**fault)) as client:  # type: ignore[arg-type]
        answer = await client.post("/v1/completions", json=ASK)
        assert (answer.status_code, error_in(answer)["code"]) == (status, code)
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text


async def test_unhandled_is_500_without_trace(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sortserve.server.routes._models", lambda state: 1 / 0)
    answer = await client.get("/v1/models")
    assert (answer.status_code, error_in(answer)["code"]) == (500, "internal_error")
    assert "division" not in answer.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=5), st.booleans())
def test_no_body_makes_a_server_error(change: dict[str, Any], chat: bool) -> None:
    async def ask() -> httpx.Response:
        async with open_client(FakeBackend()) as client:
            path = "/v1/chat/completions" if chat else "/v1/completions"
            base: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
            content = json.dumps({**base, **change})
            return await client.post(path, content=content, headers={"Content-Type": "application/json"})

    answer = asyncio.run(ask())
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error_in(answer)


def test_the_tree_is_as_drawn() -> None:
    """Every class but start-up errors has a status that HTTP can send; retryable ones alone are 429 and 5xx."""
    for kind in classes():
        if issubclass(kind, RequestError):
            assert 400 <= kind.status < 500
            assert kind.status not in (408, 409, 429)
    assert EngineFailedError.status == 503
