"""/openapi.json says what the server does. schemathesis, in tests/compat, holds all answers to it."""

import asyncio
from typing import Any

import httpx
import pytest

from sortserve.server.documented import LIMITS
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import MAX_MODEL_LEN, FakeBackend, open_client

ERRORS = {"400", "401", "404", "408", "413", "429", "431", "500", "503"}
SHORT = 1e-6  # over a limit by that much is over it
CHAT_ONLY = {"top_logprobs": {"logprobs": True}}  # what such a field needs beside it
BESIDE: dict[str, dict[str, Any]] = {
    "max_tokens": {"echo": True},
    "max_completion_tokens": {"echo": True},
    "latency_budget_policy": {"latency_budget_ms": 60_000},
}


async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


def samples() -> list[Any]:
    """(field, value, whether it is within the documented limits), at both sides of every limit that is a number."""
    made = []
    for field, kinds in LIMITS.items():
        for kind, limits in kinds.items():
            step = 1 if kind == "integer" else SHORT
            for word, sign in (("minimum", -1), ("maximum", 1)):
                if word in limits:
                    made += [(field, limits[word], True), (field, limits[word] + sign * step, False)]
            if "exclusiveMinimum" in limits:
                made += [(field, limits["exclusiveMinimum"] + SHORT, True), (field, limits["exclusiveMinimum"], False)]
            for word, character in (("minLength", -1), ("maxLength", 1)):
                if word in limits:
                    made += [(field, "x" * limits[word], True), (field, "x" * max(0, limits[word] + character), False)]
            if "enum" in limits:
                made += [*((field, value, True) for value in limits["enum"]), (field, "other", False)]
            if kind == "array":
                item = limits.get("items", {"type": "integer"})["type"]
                value: Any = "x" if item == "string" else 5
                if "maxItems" in limits:
                    most = limits["maxItems"]
                    made += [(field, [value] * most, True), (field, [value] * (most + 1), False)]
                if "minItems" in limits:
                    least = limits["minItems"]
                    made += [(field, [value] * least, True), (field, [value] * (least - 1), False)]
    made += [("logit_bias", {"5": bias}, within) for bias, within in ((-100, True), (100, True), (101, False))]
    made += [("latency_budget_ms", text, within) for text, within in (("1.5 s", True), (".5ms", True), ("1e3", False))]
    unique = {(field, repr(value)): (field, value, within) for field, value, within in made}
    return [pytest.param(*sample, id=f"{field}-{text[:24]}") for (field, text), sample in unique.items()]


@pytest.mark.parametrize(("field", "value", "within"), samples())
async def test_limits_are_those_that_are_enforced(
    client: httpx.AsyncClient, field: str, value: Any, within: bool
) -> None:
    if field in CHAT_ONLY:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **CHAT_ONLY[field]}
    else:
        path, body = "/v1/completions", {"prompt": "x", **BESIDE.get(field, {})}
    if field in ("min_tokens", "top_k", "n", "temperature"):
        body["max_tokens"] = 4
    answer = await client.post(path, json={**body, field: value})
    assert answer.status_code == (200 if within else 400), answer.text


async def test_answers_by_status(client: httpx.AsyncClient) -> None:
    paths = (await document(client))["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        operation = paths[path]["post"]
        assert set(operation["responses"]) == {"200", *ERRORS}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert "Retry-After" in operation["responses"]["429"]["headers"]
        names = {parameter["name"] for parameter in operation["parameters"]}
        assert {"X-Latency-Budget-Ms", "x-slo-ttft-ms", "X-Submodel", "X-KV-Mode"} <= names
    assert set(paths["/health"]["get"]["responses"]) == {"200", "431", "500", "503"}
    assert all("422" not in operation["responses"] for path in paths.values() for operation in path.values())


async def test_key(client: httpx.AsyncClient) -> None:
    """Named exactly where one is asked for, and only by a server that has keys."""
    assert "security" not in (await document(client))["paths"]["/v1/models"]["get"]
    async with open_client(FakeBackend(), ServerOptions(api_keys=("k",))) as keyed:
        schema = await document(keyed)
        assert schema["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                answer = await keyed.request(method, path.replace("{model_id}", "fake"), json={})
                assert (answer.status_code == 401) == ("security" in operation), path


async def test_names_of_the_model_once_it_is_loaded() -> None:
    may_load = asyncio.Event()
    async with open_client(FakeBackend(may_load=may_load), loaded=False) as client:
        loading = await document(client)
        may_load.set()
        while (await client.get("/ready")).status_code == 503:
            await asyncio.sleep(0)
        loaded = await document(client)
    fields = [schema["components"]["schemas"]["CompletionRequest"]["properties"] for schema in (loading, loaded)]
    assert "enum" not in fields[0]["submodel"]["anyOf"][0]
    assert fields[1]["submodel"]["anyOf"][0]["enum"] == ["auto", "d2", "d4-w50", "d4"]
    assert fields[1]["model"]["anyOf"][0]["enum"] == ["fake", "fake:d2", "fake:d4-w50", "fake:d4"]
    assert fields[1]["max_tokens"]["anyOf"][0]["maximum"] == MAX_MODEL_LEN
    (model_id,) = loaded["paths"]["/v1/models/{model_id}"]["get"]["parameters"]
    assert model_id["schema"]["enum"] == fields[1]["model"]["anyOf"][0]["enum"]
