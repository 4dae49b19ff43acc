"""The middleware for a user's own vLLM server, around an app that gives back what reached it."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from sortserve.engine.policies.protocol import Reason
from sortserve.engine.vllm.deciding import Decider
from sortserve.engine.vllm.reporting import Reporter
from sortserve.engine.vllm.translate import ARRIVAL, BUDGET, CEILING, FLOOR, KV, SLO, SUBMODEL
from sortserve.server.cli import BUNDLED
from sortserve.server.vllm_middleware import XARGS, LatencyBudgets
from tests.bundled import FLOOR as SMALLEST
from tests.bundled import FULL, MIDDLE


def app(stats_address: str = "") -> FastAPI:
    made = FastAPI()
    made.state.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(BUNDLED), served_model_name="mine"),
        additional_config={"sortserve": {"stats_address": stats_address}},
    )

    @made.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse("vllm:of_its_own 1.0\n")

    async def echo(request: Request) -> Any:
        content = await request.body()
        assert int(request.headers["content-length"]) == len(content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            return {"raw": content.decode()}

    for path in ("/v1/completions", "/v1/messages", "/v1/embeddings"):
        made.post(path)(echo)
    made.add_middleware(LatencyBudgets)
    return made


async def reached(
    headers: Mapping[str, str] | None = None, content: bytes | None = None, path: str = "/v1/completions", **body: Any
) -> httpx.Response:
    transport = httpx.ASGITransport(app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=content or json.dumps({"prompt": "x"} | body), headers=headers)


async def test_headers_become_arguments() -> None:
    before = time.time()
    got = (await reached({"X-Latency-Budget-TTFT-Ms": "0.5s", "X-Latency-Budget-Policy": "strict"})).json()[XARGS]
    assert (got[BUDGET], got[SLO], got[FLOOR], got[CEILING], got[KV]) == (
        [500.0, -1.0, -1.0],
        "strict",
        SMALLEST,
        FULL,
        "reuse",
    )
    assert before - 1 <= got[ARRIVAL] <= time.time() + 1
    for path in ("/v1/completions", "/v1/messages"):
        assert (await reached({"X-Submodel": MIDDLE}, path=path)).json()[XARGS][SUBMODEL] == MIDDLE


async def test_fields_become_arguments_and_leave_the_body() -> None:
    got = (await reached(latency_budget_ms=900, vllm_xargs={"mine": 1}, max_tokens=3)).json()
    assert got[XARGS]["mine"] == 1
    assert got[XARGS][BUDGET] == [-1.0, -1.0, 900.0]
    assert (got["max_tokens"], "latency_budget_ms" in got) == (3, False)


async def test_what_asks_for_nothing_stays_as_it_is() -> None:
    assert (await reached(max_tokens=3)).json() == {"prompt": "x", "max_tokens": 3}
    assert (await reached(content=b"no json")).json() == {"raw": "no json"}
    assert (await reached(content=b"[1]")).json() == [1]
    nested = "[" * 100_000  # a RecursionError of the parser ended as a 500
    assert (await reached(content=nested.encode())).json() == {"raw": nested}
    assert XARGS not in (await reached({"X-Latency-Budget-Ms": "5"}, path="/v1/embeddings")).json()


@pytest.mark.parametrize(
    ("headers", "body", "status", "param"),
    [
        ({"X-Latency-Budget-Ms": "soon"}, {}, 400, "X-Latency-Budget-Ms"),
        ({"X-Submodel": "d99"}, {}, 404, "X-Submodel"),
        ({}, {"submodel": 3}, 400, "submodel"),
        ({}, {"quality_floor": "0.5"}, 400, "quality_floor"),
        ({}, {XARGS: {SUBMODEL: "d99"}}, 404, SUBMODEL),
        ({}, {XARGS: {BUDGET: [1, 2]}}, 400, BUDGET),
        ({}, {XARGS: {"sortserve_depth": 2}}, 400, "sortserve_depth"),
    ],
)
async def test_mistakes_are_told_before_vllm_sees_them(
    headers: dict[str, str], body: dict[str, Any], status: int, param: str
) -> None:
    refused = await reached(headers, **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)


async def end(served: FastAPI) -> None:
    """Start and stop, as a server tells it."""
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(messages)}

    async def send(message: Any) -> None: ...

    await served({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)


async def test_the_schedulers_figures_stand_behind_vllms_own(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/stats"
    served = app(address)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://test") as client:
        assert (await client.get("/metrics")).text == "vllm:of_its_own 1.0\n", "nothing was reported yet"
        decider = SimpleNamespace(stats=lambda: {"errors": {"decode": [9, 0.25, 0.9]}})
        reporter = Reporter(address)
        scheduler = SimpleNamespace(get_request_counts=lambda: (3, 1), kv_cache_manager=SimpleNamespace(usage=0.5))
        reporter.selected(FULL, Reason.BEST)
        reporter.generated(FULL, 7)
        reporter.dropped("refused")
        reporter.report(scheduler, cast(Decider, decider), 1.0, goes_on=True)
        reporter.generated(FULL, 3)
        reporter.report(scheduler, cast(Decider, decider), 1.1, goes_on=True)  # too soon after the other one
        reporter.generated(FULL, 4)
        reporter.report(scheduler, cast(Decider, decider), 1.2, goes_on=False)  # nobody is left: no other one will come
        deadline = time.monotonic() + 30
        last = f'submodel="{FULL}"}} 14.0'
        while last not in (text := (await client.get("/metrics")).text) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        reporter.close()
    await end(served)
    for line in (
        "vllm:of_its_own 1.0",
        'sortserve_requests_running{model="mine"} 3.0',
        f'sortserve_generation_tokens_total{{model="mine",submodel="{FULL}"}} 14.0',
        f'sortserve_submodel_selected_total{{model="mine",reason="best",submodel="{FULL}"}} 1.0',
        'sortserve_requests_dropped_total{model="mine",reason="refused"} 1.0',
        'sortserve_step_time_error_ratio{kind="decode",model="mine"} 0.25',
    ):
        assert line in text.splitlines()


async def test_an_address_that_is_taken_costs_only_the_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ipc://{tmp_path}/no-folder/stats"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app(address)), base_url="http://test") as client:
        assert (await client.get("/metrics")).text == "vllm:of_its_own 1.0\n"
    assert "no sortserve_ metrics of this process" in caplog.text
