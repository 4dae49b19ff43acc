"""Budgets and other terms: from headers and body, checked against the ladder."""

import math
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from sortserve.engine.budget import Budget
from sortserve.engine.errors import NotFoundError, RequestError
from sortserve.server.budget_headers import Terms, parse_milliseconds, read_terms
from sortserve.server.keys import Bounds
from sortserve.server.schemas import CompletionRequest
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, ladder, open_client

REUSE = frozenset({"reuse"})


def terms(headers: dict[str, str] | list[tuple[str, str]] | None = None, **body: Any) -> Terms:
    given = headers.items() if isinstance(headers, dict) else headers or []
    raw = [(name.lower().encode(), value.encode()) for name, value in given]
    request = CompletionRequest.model_validate({"prompt": "x", **body})
    return read_terms(Headers(raw=raw), request, ladder(), capabilities=REUSE)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("500", 500), ("500ms", 500), ("0.5s", 500), (" 500 ms ", 500), (".5s", 500), ("5.", 5), ("3600s", 3.6e6)],
)
def test_values(text: str, milliseconds: float) -> None:
    assert parse_milliseconds(text, "h") == milliseconds


BAD = [
    "0",
    "-1",
    "abc",
    "NaN",
    "inf",
    "",
    "1e3",
    "5 m",
    "0s",
    "3600001",
    "3601s",
    "500, 500",
    "\u0665",
    "+5",
    "1_0",
    "9" * 40,
]


@pytest.mark.parametrize("value", [*BAD, "9" * 40, 0, -1, math.nan, math.inf, 3_600_001])
def test_bad_values_name_the_header(value: str | float) -> None:
    with pytest.raises(RequestError, match=r"500ms or 0\.5s") as caught:
        parse_milliseconds(value, "X-Latency-Budget-Ms")
    assert caught.value.param == "X-Latency-Budget-Ms"


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_request_error(text: str) -> None:
    try:
        milliseconds = parse_milliseconds(text, "h")
    except RequestError:
        return
    assert 0 < milliseconds <= 3.6e6


@given(st.floats(0.01, 3.6e6))
def test_milliseconds_and_seconds_agree(milliseconds: float) -> None:
    text = f"{milliseconds:.3f}"
    expected = float(text)
    assert parse_milliseconds(text, "h") == parse_milliseconds(f"{text}ms", "h") == expected
    assert parse_milliseconds(f"{expected / 1e3:.9f}s", "h") == pytest.approx(expected, rel=1e-4)


def test_header_wins_over_body() -> None:
    headers = {"X-Latency-Budget-Ms": "100", "X-Submodel": "d2", "X-Quality-Floor": "0.5", "X-KV-Mode": "exact"}
    body: dict[str, Any] = {"latency_budget_ms": "2s", "submodel": "d4", "quality_floor": 0.95, "kv_mode": "reuse"}
    assert terms(headers, **body) == Terms(Budget(100.0), "d2", None, 0.5, "exact")
    assert terms(**body) == Terms(Budget(2000.0), "d4", None, 0.95, "reuse")


@pytest.mark.parametrize("part", ["ttft", "tpot"])
def test_aliases(part: str) -> None:
    for name in (f"X-Latency-Budget-{part}-Ms", f"x-llm-d-slo-{part}-ms", f"X-SLO-{part}-MS"):
        budget = terms({name: "20"}).budget
        assert budget is not None
        assert (budget.total_ms, getattr(budget, f"{part}_ms")) == (None, 20.0)
        with pytest.raises(RequestError) as caught:
            terms({name: "x"})
        assert (caught.value.param or "").lower() == name.lower()


def test_repeated_headers_and_aliases_are_refused() -> None:
    for pair in (
        [("X-Latency-Budget-Ms", "5"), ("x-latency-budget-ms", "5")],
        [("X-Latency-Budget-TTFT-Ms", "5"), ("x-slo-ttft-ms", "5")],
        [("X-Submodel", "d4"), ("X-Submodel", "d4")],
        [("X-KV-Mode", "exact"), ("X-KV-Mode", "exact")],
        [("X-Quality-Floor", "0.5"), ("X-Quality-Floor", "0.5")],
    ):
        with pytest.raises(RequestError, match="give it once") as caught:
            terms(pair)
        assert (caught.value.param or "").lower() == pair[1][0].lower()


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-Latency-Budget-Policy": "Strict", "X-Latency-Budget-Ms": "5"}, "X-Latency-Budget-Policy"),
        ({"X-Latency-Budget-Policy": "strict"}, "X-Latency-Budget-Policy"),
        ({"X-Quality-Floor": "1.1"}, "X-Quality-Floor"),
        ({"X-Quality-Floor": "nan"}, "X-Quality-Floor"),
        ({"X-Quality-Floor": "good"}, "X-Quality-Floor"),
        ({"X-KV-Mode": "none"}, "X-KV-Mode"),
        ({"X-Submodel": "d2", "X-Submodel-Floor": "d4"}, "X-Submodel-Floor"),
        ({"X-Submodel": "d2", "X-Quality-Floor": "0.85"}, "X-Quality-Floor"),
    ],
)
def test_bad_terms(headers: dict[str, str], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        terms(headers)
    assert caught.value.param == param


@pytest.mark.parametrize("name", ["X-Submodel", "X-Submodel-Floor"])
def test_unknown_submodel_lists_what_there_is(name: str) -> None:
    with pytest.raises(NotFoundError, match="d2, d4-w50, d4") as caught:
        terms({name: "d3"})
    assert caught.value.param == name


def test_reuse_must_be_something_the_back_end_can_do() -> None:
    body = CompletionRequest(prompt="x", kv_mode="reuse")
    with pytest.raises(RequestError, match="not supported"):
        read_terms(Headers(), body, ladder())


def test_kind_of_kv() -> None:
    assert terms().effective_kv_mode == "exact"
    assert terms({"X-Latency-Budget-Ms": "5"}).effective_kv_mode == "reuse"
    assert terms({"X-Latency-Budget-Ms": "5", "X-Submodel": "d4"}).effective_kv_mode == "exact"


# --- through HTTP

ASK = {"prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize("value", ["0", "-1", "abc", "NaN"])
async def test_bad_budget_is_400(client: httpx.AsyncClient, backend: FakeBackend, value: str) -> None:
    header = await client.post("/v1/completions", json=ASK, headers={"X-Latency-Budget-Ms": value})
    assert header.status_code == 400
    assert header.json()["error"]["param"] == "X-Latency-Budget-Ms"
    body = await client.post("/v1/completions", json=ASK | {"latency_budget_ms": value})
    assert body.status_code == 400
    assert body.json()["error"]["param"] == "latency_budget_ms"
    assert backend.requests == []


async def test_repeated_header_is_400(client: httpx.AsyncClient) -> None:
    headers = [("X-Latency-Budget-Ms", "500"), ("X-Latency-Budget-Ms", "500")]
    answer = await client.post("/v1/completions", json=ASK, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Latency-Budget-Ms"


async def test_budget_reaches_the_back_end_and_is_told(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    headers = {"X-Latency-Budget-Ms": "5s", "x-slo-ttft-ms": "900", "X-Latency-Budget-Policy": "cut"}
    answer = await client.post("/v1/completions", json=ASK | {"n": 2}, headers=headers)
    assert answer.status_code == 200
    assert [request.budget for request in backend.requests] == [Budget(5000.0, 900.0, None, "cut")] * 2
    assert answer.headers["X-Latency-Budget-Ms"] == "5000"
    assert answer.headers["X-Latency-Budget-TTFT-Ms"] == "900"
    assert answer.headers["X-Latency-Predicted-Ms"] == "250"
    assert answer.headers["X-Latency-Budget-Status"] == "met"
    told = answer.json()["sortserve"]
    assert (told["budget_ms"], told["met"]) == (5000.0, True)


async def test_missed_budget_is_told() -> None:
    async with open_client(FakeBackend(delay=0.02, predicted_met=False)) as client:
        answer = await client.post("/v1/completions", json=ASK, headers={"X-Latency-Budget-Ms": "5"})
        assert answer.headers["X-Latency-Budget-Status"] == "missed"
        assert answer.json()["sortserve"]["met"] is False
        streamed = await client.post("/v1/completions", json=ASK | {"stream": True, "latency_budget_ms": 5})
        assert streamed.headers["X-Latency-Budget-Status"] == "predicted-miss"


async def test_default_budget() -> None:
    backend = FakeBackend()
    async with open_client(backend, ServerOptions(default_latency_budget_ms=700.0)) as client:
        await client.post("/v1/completions", json=ASK)
        await client.post("/v1/completions", json=ASK | {"latency_budget_tpot_ms": 50})
    assert [request.budget for request in backend.requests] == [Budget(700.0), Budget(tpot_ms=50.0)]


async def test_pinning_by_model_name(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    answer = await client.post("/v1/completions", json=ASK | {"model": "fake:d2"})
    assert answer.headers["X-Submodel"] == "d2"
    assert answer.json()["model"] == "fake:d2"
    assert answer.json()["sortserve"]["submodels"] == {"d2": 2}
    clash = await client.post("/v1/completions", json=ASK | {"model": "fake:d2", "submodel": "d4"})
    assert (clash.status_code, clash.json()["error"]["param"]) == (400, "submodel")
    auto = await client.post("/v1/completions", json=ASK | {"model": "fake:d2"}, headers={"X-Submodel": "auto"})
    assert auto.headers["X-Submodel"] == "d4"
    assert [request.submodel for request in backend.requests] == ["d2", "auto"]


# --- the time a proxy waits

PROXY = {"x-envoy-expected-rq-timeout-ms": "300"}


async def budget_behind_proxy(
    headers: dict[str, str], trust: bool = True, default: float | None = None
) -> Budget | None:
    backend = FakeBackend()
    options = ServerOptions(trust_proxy_timeouts=trust, default_latency_budget_ms=default)
    async with open_client(backend, options) as client:
        answer = await client.post("/v1/completions", json=ASK, headers=headers)
        assert answer.status_code == 200, answer.text
    return backend.requests[0].budget


async def test_proxy_timeout_caps_a_total_and_nothing_else() -> None:
    assert await budget_behind_proxy(PROXY | {"X-Latency-Budget-Ms": "900"}) == Budget(300.0)
    assert await budget_behind_proxy(PROXY | {"X-Latency-Budget-Ms": "200"}) == Budget(200.0)
    assert await budget_behind_proxy(PROXY, default=900.0) == Budget(300.0)
    assert await budget_behind_proxy(PROXY) is None, "a proxy's timeout alone must not cost quality"
    assert await budget_behind_proxy(PROXY | {"X-Latency-Budget-TTFT-Ms": "50"}) == Budget(ttft_ms=50.0)
    never = {"x-envoy-expected-rq-timeout-ms": "0", "X-Latency-Budget-Ms": "900"}
    assert await budget_behind_proxy(never) == Budget(900.0)


async def test_proxy_timeout_is_not_trusted_unasked() -> None:
    assert await budget_behind_proxy(PROXY | {"X-Latency-Budget-Ms": "900"}, trust=False) == Budget(900.0)
    bad = {"x-envoy-expected-rq-timeout-ms": "soon", "X-Latency-Budget-Ms": "900"}
    assert await budget_behind_proxy(bad, trust=False) == Budget(900.0)


@pytest.mark.parametrize("values", [["soon"], ["1.5"], ["-1"], ["300", "300"], [""]])
async def test_bad_proxy_timeout_is_400(values: list[str]) -> None:
    async with open_client(FakeBackend(), ServerOptions(trust_proxy_timeouts=True)) as client:
        headers = [("X-Latency-Budget-Ms", "5"), *(("x-envoy-expected-rq-timeout-ms", value) for value in values)]
        answer = await client.post("/v1/completions", json=ASK, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-envoy-expected-rq-timeout-ms")


def test_key_bounds_come_before_the_proxy() -> None:
    """A key's smallest budget does not keep a request from ending when nobody waits for it any more."""
    headers = Headers({"x-envoy-expected-rq-timeout-ms": "300", "X-Latency-Budget-Ms": "5"})
    body = CompletionRequest(prompt="x")
    read = read_terms(headers, body, ladder(), bounds=Bounds(500.0, None), trust_proxy_timeouts=True)
    assert read.budget == Budget(300.0)
