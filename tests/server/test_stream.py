"""Streams: framing, what every chunk carries, errors after the 200, and clients that leave."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.protocol import GenerateRequest, TokenEvent
from sortserve.engine.sampling import SamplingParams
from sortserve.server.app import create_app
from sortserve.server.streams import EventStreams
from tests.server.fake_backend import FakeBackend, byte_tokenizer, open_client, served, state_of


async def chunks(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The JSON of each event, the framing checked."""
    base = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    answer = await client.post(path, json={**base, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert "X-Submodel" in answer.headers
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def text_of(found: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def reasons(found: list[dict[str, Any]], index: int = 0) -> list[str]:
    choices = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_stream(client: httpx.AsyncClient, path: str) -> None:
    found = await chunks(client, path, max_tokens=5, stream_options={"include_usage": True})
    for name in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[name] for chunk in found}) == 1
    assert text_of(found) == "hello"
    assert reasons(found) == ["length"]
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 5
    assert found[-1]["sortserve"]["submodels"] == {"d4": 5}
    assert all(chunk["usage"] is None and "sortserve" not in chunk for chunk in found[:-1])
    if "chat" in path:
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in chunk["choices"][0]["delta"] for chunk in found[1:-1])


async def test_who_asks_for_no_usage_is_told_in_the_last_chunk(client: httpx.AsyncClient) -> None:
    found = await chunks(client, n=2, latency_budget_ms=60_000)
    assert [index for index, chunk in enumerate(found) if "sortserve" in chunk] == [len(found) - 1]
    assert found[-1]["sortserve"]["met"] is True
    assert not any("usage" in chunk for chunk in found)
    assert [text_of(found, index) for index in (0, 1)] == ["hello world"] * 2
    assert [reasons(found, index) for index in (0, 1)] == [["stop"]] * 2


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"] for chunk in await chunks(client, max_tokens=3, stream_options=options)
    ]
    assert counts == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_stop_string_never_leaks(client: httpx.AsyncClient, backend: FakeBackend, path: str) -> None:
    found = await chunks(client, path, stop="o w", logprobs=1 if "chat" not in path else True)
    assert text_of(found) == "hell"
    assert reasons(found) == ["stop"]
    assert '"o"' not in json.dumps(found)
    assert backend.aborted == [backend.requests[0].request_id]


async def test_stop_of_one_choice_leaves_the_others(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.delay = 0.001
    found = await chunks(client, prompt=["a", "b"], stop="wor")
    assert [text_of(found, index) for index in (0, 1)] == ["hello "] * 2
    assert [reasons(found, index) for index in (0, 1)] == [["stop"]] * 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(alphabet="abé中😀\n", max_size=12), st.lists(st.text(alphabet="abé\n", min_size=1, max_size=3), max_size=2)
)
def test_streamed_and_whole_say_the_same(text: str, stop: list[str]) -> None:
    async def ask() -> None:
        async with open_client(FakeBackend(answer=tuple(text.encode()))) as client:
            whole = await client.post("/v1/completions", json={"prompt": "x", "stop": stop, "max_tokens": 99})
            found = await chunks(client, stop=stop, max_tokens=99)
            choice = whole.json()["choices"][0]
            assert text_of(found) == choice["text"]
            assert reasons(found) == [choice["finish_reason"]]
            assert not any(one in choice["text"] for one in stop)
            assert "\ufffd" not in text_of(found)

    asyncio.run(ask())


async def test_prompt_logprobs_streamed(client: httpx.AsyncClient) -> None:
    found = await chunks(client, prompt="ab", echo=True, logprobs=0, max_tokens=1)
    assert text_of(found) == "abh"
    tokens = [token for chunk in found for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == ["a", "b", "h"]
    assert text_of(await chunks(client, prompt="ab", echo=True, max_tokens=2)) == "abhe"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"fail_after": 2}, "engine_failed"),
        ({"vanish_after": 2}, "engine_failed"),
        ({"raise_after": 2}, "internal_error"),
    ],
)
async def test_failure_after_the_200_is_one_error_event(fault: dict[str, int], code: str) -> None:
    async with open_client(FakeBackend(**fault)) as client:  # type: ignore[arg-type]
        answer = await client.post("/v1/completions", json={"prompt": "x", "stream": True})
        events = answer.text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        errors = [json.loads(event[6:])["error"] for event in events if '"error"' in event]
        assert [error["code"] for error in errors] == [code]
        assert "secret" not in answer.text
        assert 'finish_reason":"' not in answer.text
        metrics = (await client.get("/metrics")).text
        assert 'finish_reason="error",model="fake",status="200",submodel="d4"} 1.0' in metrics


async def test_first_event_decides_the_status(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.fail_after = 0  # after it was accepted: the headers have left
    found = await chunks(client)
    assert found[-1]["error"]["code"] == "engine_failed"


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_leaves_aborts_its_requests() -> None:
    """Over a socket: while streaming, before a whole answer, and before the first event."""
    backend = FakeBackend(answer=tuple(b"x" * 100), delay=0.05)
    app = create_app(backend, byte_tokenizer())
    ask = {"prompt": ["x", "y"], "max_tokens": 100}
    with served(app) as url:
        with (
            httpx.Client() as client,
            client.stream("POST", f"{url}/v1/completions", json=ask | {"stream": True}) as got,
        ):
            lines = got.iter_lines()  # kept: the response is closed with its iterator
            next(lines)
            assert backend.running == 2
        eventually(lambda: backend.running == 0)
        assert len(backend.aborted) == 2

        body = json.dumps(ask).encode()
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0), timeout=60) as leaving:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            eventually(lambda: backend.running == 2)
        eventually(lambda: len(backend.aborted) == 4 and backend.running == 0)
        text = httpx.get(f"{url}/metrics").text
        assert 'finish_reason="abort",model="fake",status="499"' in text
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_openai_client_streams() -> None:
    backend = FakeBackend()
    with served(create_app(backend, byte_tokenizer())) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        with client:
            stream = client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"latency_budget_ms": "60s"},
            )
            got = list(stream)
            assert got[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in got if chunk.choices) == "hello world"
            assert got[-1].usage is not None
            assert (got[-1].model_extra or {})["sortserve"]["met"] is True
            texts = client.completions.create(model="fake", prompt="x", stream=True, stop=" w")
            assert "".join(chunk.choices[0].text for chunk in texts) == "hello"
            backend.fail_after = 1
            with pytest.raises(openai.APIError, match="the engine died"):
                list(client.completions.create(model="fake", prompt="x", stream=True))


async def test_abort_by_the_engine_is_an_error(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from sortserve.engine.protocol import AcceptedEvent, FinishedEvent, RequestSummary

    async def generate(request: Any) -> Any:
        yield AcceptedEvent(request.request_id, "d4", None, True)
        yield FinishedEvent(request.request_id, "abort", RequestSummary())

    state = state_of(client)
    monkeypatch.setattr(state.backend, "generate", generate)
    assert (await chunks(client))[-1]["error"]["code"] == "engine_failed"
    answer = await client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 503


@pytest.mark.parametrize("stream", [True, False])
async def test_given_up_before_it_began(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """What still waits when a drain ends is aborted without having been accepted: the client waited for ever."""
    from sortserve.engine.protocol import FinishedEvent, RequestSummary

    async def generate(request: Any) -> Any:
        yield FinishedEvent(request.request_id, "abort", RequestSummary())

    monkeypatch.setattr(state_of(client).backend, "generate", generate)
    answer = await asyncio.wait_for(client.post("/v1/completions", json={"prompt": "x", "stream": stream}), 60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert "Retry-After" in answer.headers


@pytest.mark.parametrize("number", [1, 2])
async def test_a_complete_answer_is_aborted_before_its_last_chunk_leaves(number: int) -> None:
    """One that is complete by its stop string: a client that reads slowly would hold its slot until it has read all."""
    backend = FakeBackend(answer=tuple(b"ab.cdefghij"))
    streams = EventStreams(
        backend, [GenerateRequest(f"r{place}", (1,), SamplingParams(max_tokens=9), 0.0) for place in range(number)]
    )
    await streams.begun()
    seen = 0
    async for place, event in streams.events():
        if isinstance(event, TokenEvent):
            streams.stop(place)
            seen += 1
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(backend.aborted) == seen
    assert (seen, backend.running) == (number, 0)
    await streams.close()
