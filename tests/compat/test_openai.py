"""The official OpenAI client, synchronous and asynchronous."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundled import FLOOR, FULL
from tests.compat.conftest import KEY
from tests.compat.environments import HERE, environment
from tests.compat.servers import counted, serving
from tests.server.real_server import Server

SCENARIOS = ("completions", "chat", "asynchronous", "logprobs", "several", "budgets", "models", "refusals")
Seen = Mapping[str, Any]


def ask(server: Server, key: str, folder: Path, *scenarios: str) -> dict[str, Any]:
    """What the client saw, by scenario."""
    script = str(HERE / "clients" / "openai_client.py")
    printed = environment("openai").run(
        "python", script, server.url, key, str(server.process.pid), *scenarios, folder=folder
    )
    seen: dict[str, Any] = json.loads(printed)
    for name, found in seen.items():
        assert "failed" not in found, f"{name}: {found}"
    return seen


@pytest.fixture(scope="module")
def seen(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return ask(server, "none", tmp_path_factory.mktemp("openai"), *SCENARIOS)


def test_completions(seen: Seen) -> None:
    whole, chunks = seen["completions"]["whole"], seen["completions"]["chunks"]
    assert whole["usage"]["completion_tokens"] == 16
    assert whole["choices"][0]["finish_reason"] == "length"
    *content, last = chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in content) == whole["choices"][0]["text"] != ""
    assert content[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in content[:-1])
    assert all(chunk["usage"] is None for chunk in content)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert last["sortserve"]["submodels"] == whole["sortserve"]["submodels"] == {FULL: 16}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


def test_chat(seen: Seen) -> None:
    whole, chunks = seen["chat"]["whole"], seen["chat"]["chunks"]
    *content, last = chunks
    assert content[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in content)
    assert text == whole["choices"][0]["message"]["content"] == seen["chat"]["accumulated"] != ""
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counted == sorted(counted), "continuous usage grows"
    assert (counted[0], counted[-1]) == (0, whole["usage"]["completion_tokens"])
    assert last["choices"] == []
    assert whole["system_fingerprint"].endswith(f"-{FULL}")


def test_asynchronous(seen: Seen) -> None:
    """Streamed and whole answers to the same prompt, in pairs."""
    answers = seen["asynchronous"]
    assert len(answers) == 8
    assert answers[::2] == answers[1::2]


def test_logprobs(seen: Seen) -> None:
    completion, chat, echo = (seen["logprobs"][name] for name in ("completion", "chat", "echo"))
    lists = completion["logprobs"]
    assert "".join(lists["tokens"]) == completion["text"]
    assert lists["token_logprobs"] == [max(top.values()) for top in lists["top_logprobs"]], "greedy takes the likeliest"
    assert {len(top) for top in lists["top_logprobs"]} == {3}
    places = zip(lists["text_offset"], lists["tokens"], strict=True)
    assert all(completion["text"].startswith(token, start) for start, token in places)
    tokens = chat["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == chat["message"]["content"]
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in tokens)
    prompt = echo["logprobs"]
    assert prompt["token_logprobs"][0] is prompt["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in prompt["token_logprobs"][1:])
    bos, *tokens = prompt["tokens"]
    assert bos == "<|bos|>"
    assert "".join(tokens) == echo["text"]
    assert echo["text"].startswith("Once upon a time there was a king")
    assert len(echo["text"]) > len("Once upon a time there was a king")


def test_n_seed_stop(seen: Seen) -> None:
    drawn = seen["several"]
    assert [index for index, *_ in drawn["three"]] == [0, 1, 2]
    assert len({text for _, text, _ in drawn["three"]}) == 3
    assert drawn["three"] == drawn["again"] != drawn["other"]
    assert [index for index, *_ in drawn["prompts"]] == [0, 1]
    assert drawn["prompts"][0] == drawn["plain"][0]
    assert drawn["tokens"][0][1] == drawn["tokens"][1][1] != ""
    text, stop = drawn["plain"][0][1], drawn["stop"]
    assert drawn["stopped"] == [[0, text[: text.index(stop)], "stop"]]


def test_budgets(seen: Seen) -> None:
    found = seen["budgets"]
    header, body, default, pinned = (found[name] for name in ("header", "body", "default", "pinned"))
    assert header["headers"]["x-request-id"] == "compat-1"
    assert header["headers"]["x-latency-budget-status"] == "met"
    assert "queue;dur=" in header["headers"]["server-timing"]
    for answer in (header, body):
        assert answer["headers"]["x-latency-budget-ms"] == "30000"
        assert float(answer["headers"]["x-latency-predicted-ms"]) > 0
        assert answer["body"]["sortserve"]["budget_ms"] == 30_000
        assert answer["body"]["sortserve"]["met"] is True
        assert set(answer["body"]["sortserve"]["submodels"]) == {FULL}, "30 s are ample"
    assert "x-latency-budget-ms" not in default["headers"]
    assert default["headers"]["x-latency-budget-ttft-ms"] == "20000"
    assert default["headers"]["x-latency-budget-tpot-ms"] == "9000"
    assert pinned["headers"]["x-submodel"] == FLOOR
    assert pinned["body"]["sortserve"]["submodels"] == {FLOOR: 16}
    assert pinned["body"]["choices"] != header["body"]["choices"]
    stream = found["stream"]
    assert stream["headers"]["content-type"].startswith("text/event-stream")
    assert stream["headers"]["x-latency-budget-status"] in ("ok", "predicted-miss")
    assert stream["last"] == "data: [DONE]"
    assert stream["told"]["sortserve"]["met"] is True


def test_models(server: Server, seen: Seen) -> None:
    listed = seen["models"]["list"]
    ladder = httpx.get(f"{server.url}/v1/submodels").json()["data"]
    assert [model["id"] for model in listed] == ["bundled", *(f"bundled:{entry['id']}" for entry in ladder)]
    assert seen["models"]["each"] == listed
    assert {model["max_model_len"] for model in listed} == {1024}


REFUSALS = {
    # class, status, code, param, type
    "wrong type": ("BadRequestError", 400, "invalid_type", "prompt", "invalid_request_error"),
    "too long": ("BadRequestError", 400, "context_length_exceeded", "prompt", "invalid_request_error"),
    "temperature": ("BadRequestError", 400, "invalid_value", "temperature", "invalid_request_error"),
    "bad header": ("BadRequestError", 400, "invalid_value", "X-Latency-Budget-Ms", "invalid_request_error"),
    "model": ("NotFoundError", 404, "model_not_found", "model", "not_found_error"),
    "submodel": ("NotFoundError", 404, "model_not_found", "X-Submodel", "not_found_error"),
    "retrieve": ("NotFoundError", 404, "model_not_found", "model", "not_found_error"),
    "path": ("NotFoundError", 404, "not_found", None, "not_found_error"),
    "too large": ("APIStatusError", 413, "payload_too_large", None, "invalid_request_error"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(seen: Seen, name: str) -> None:
    refusal = seen["refusals"][name]
    told = tuple(refusal[part] for part in ("class", "status", "code", "param", "type"))
    assert told == REFUSALS[name]
    assert refusal["message"]


def test_an_impossible_strict_budget_is_not_tried_again(seen: Seen) -> None:
    """By a client that would try twice more."""
    refusal = seen["refusals"]["strict"]
    assert (refusal["class"], refusal["code"]) == ("BadRequestError", "latency_budget_infeasible")
    assert refusal["headers"]["x-should-retry"] == "false"
    assert refusal["retries"] == 0


def test_time_outs_and_lost_servers(seen: Seen) -> None:
    assert seen["refusals"]["timeout"] == {"class": "APITimeoutError"}
    assert seen["refusals"]["no server"] == {"class": "APIConnectionError"}
    assert seen["refusals"]["key"] is None, "a server without keys takes any"


def test_keys(keyed_server: Server, tmp_path: Path) -> None:
    seen = ask(keyed_server, KEY, tmp_path, "models", "refusals")
    refusal = seen["refusals"]["key"]
    told = tuple(refusal[part] for part in ("class", "status", "code", "type"))
    assert told == ("AuthenticationError", 401, "invalid_api_key", "authentication_error")
    assert refusal["headers"]["www-authenticate"] == "Bearer"
    assert "sk-wrong" not in refusal["message"]


def test_overload_is_tried_again(keyed_server: Server, tmp_path: Path) -> None:
    """A RateLimitError after as many tries as the client was told to make; the next request is served."""
    before = counted(keyed_server, "requests_total", status="429")
    found = ask(keyed_server, KEY, tmp_path, "overload")["overload"]
    refusal = found["refused"]
    told = tuple(refusal[part] for part in ("class", "status", "code", "type"))
    assert told == ("RateLimitError", 429, "overloaded", "rate_limit_error")
    assert refusal["retries"] == 2
    assert counted(keyed_server, "requests_total", status="429") == before + 3
    assert float(refusal["headers"]["retry-after-ms"]) > 0
    assert int(refusal["headers"]["retry-after"]) >= 1
    assert refusal["headers"]["x-dropped-reason"] == "rejected-saturated"
    assert (found["after"], found["retries"]) == (200, 0)


def test_draining(tmp_path: Path) -> None:
    with serving() as server:
        found = ask(server, "none", tmp_path, "drain")["drain"]
        assert server.process.wait(30) == 0, "it exits when the stream is done, long before --shutdown-timeout"
    refusal = found["refused"]
    assert (refusal["class"], refusal["status"], refusal["code"]) == ("InternalServerError", 503, "draining")
    assert refusal["headers"]["x-dropped-reason"] == "rejected-shutting-down"
    assert int(refusal["headers"]["retry-after"]) >= 1
    assert found["finish"] == "length"
    assert sum(found["told"]["submodels"].values()) == 600, "the stream that ran was not cut short"
