"""`--metrics-compat vllm`: the same observations under vLLM's names."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sortserve.engine.protocol import EngineStats, FailedEvent
from sortserve.server.metrics import SECONDS, Metrics, Served
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, open_client

ASK: dict[str, Any] = {"prompt": "x", "max_tokens": 3}
# what the endpoint picker of the Gateway API Inference Extension, llm-d and production-stack read
READ_BY_ROUTERS = {
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:time_per_output_token_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(client: httpx.AsyncClient, accept: str = "") -> str:
    return (await client.get("/metrics", headers={"Accept": accept})).text


async def test_off_by_default(client: httpx.AsyncClient) -> None:
    assert "vllm:" not in await scrape(client)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_every_family_is_there(accept: str) -> None:
    async with open_client(FakeBackend(), ServerOptions(vllm_metrics=True)) as client:
        await client.post("/v1/completions", json=ASK)
        text = await scrape(client, accept)
    for name, kind in READ_BY_ROUTERS.items():
        declared = f"# TYPE {name} {kind}\n"
        if accept and name.endswith("_info"):
            declared = "# TYPE vllm:cache_config info\n"
        assert declared in text, name


async def test_engine_state() -> None:
    async with open_client(FakeBackend(), ServerOptions(vllm_metrics=True)) as client:
        found = samples(await scrape(client))
    model = (("model_name", "fake"),)
    assert found["vllm:num_requests_waiting", model] == 1
    assert found["vllm:num_requests_running", model] == 0
    assert found["vllm:kv_cache_usage_perc", model] == 0.25
    assert found["vllm:cache_config_info", (("block_size", "16"), *model, ("num_gpu_blocks", "4"))] == 1


async def test_same_observations_of_all_submodels() -> None:
    backend = FakeBackend(delay=0.001)
    async with open_client(backend, ServerOptions(vllm_metrics=True)) as client:
        for submodel in ("d2", "d4", "d4"):
            await client.post("/v1/completions", json=ASK | {"submodel": submodel})
        backend.refuse = FailedEvent("", "OverloadedError", "full")
        await client.post("/v1/completions", json=ASK)
        found = samples(await scrape(client))
    for theirs, ours in (
        ("time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("request_time_per_output_token_seconds", "time_per_output_token_seconds"),
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        ("time_per_output_token_seconds", "time_per_output_token_seconds"),
        ("e2e_request_latency_seconds", "request_duration_seconds"),
    ):
        for part in ("_count", "_sum"):
            parts = [found[f"sortserve_{ours}{part}", (("model", "fake"), ("submodel", id))] for id in ("d2", "d4")]
            assert found[f"vllm:{theirs}{part}", (("model_name", "fake"),)] == pytest.approx(sum(parts))
        assert found[f"vllm:{theirs}_count", (("model_name", "fake"),)] == 3, "the refused one has no latency"


def test_buckets_add_up() -> None:
    metrics = Metrics(vllm=True)
    for submodel, seconds in (("d2", 0.003), ("d2", 0.3), ("d4", 0.003), ("d4", 1e9)):
        metrics.observe(Served("chat", 200, "stop", seconds, submodel))
    found = samples(metrics.render("")[0].decode())
    counts = [
        found["vllm:e2e_request_latency_seconds_bucket", (("le", str(bound)), ("model_name", ""))] for bound in SECONDS
    ]
    assert counts == [2.0 * (bound > 0.003) + (bound > 0.3) for bound in SECONDS]
    assert found["vllm:e2e_request_latency_seconds_bucket", (("le", "+Inf"), ("model_name", ""))] == 4


def test_before_the_first_request_and_without_an_engine() -> None:
    metrics = Metrics(vllm=True)
    metrics.take(None, ready=False, restarts=0)
    text = metrics.render("")[0].decode()
    assert 'vllm:num_requests_waiting{model_name=""} 0.0' in text
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in text


async def test_every_family_is_documented() -> None:
    table = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text()
    async with open_client(FakeBackend(), ServerOptions(vllm_metrics=True)) as client:
        text = await scrape(client)
    declared = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    names = [name.removeprefix("sortserve_") for name in declared if not name.endswith("_created")]
    assert len(names) > 30
    assert [name for name in names if f"`{name}`" not in table] == []


def test_counters_stay_while_the_engine_is_too_busy_to_answer() -> None:
    """They became 0 for one scrape, which a rate takes for a restart and a million tokens."""
    metrics = Metrics()
    metrics.take(EngineStats(prompt_tokens=7), ready=True, restarts=0)
    metrics.take(None, ready=True, restarts=0)
    assert 'sortserve_prompt_tokens_total{model=""} 7.0' in metrics.render("")[0].decode()
    metrics.take(None, ready=False, restarts=1)
    assert 'sortserve_prompt_tokens_total{model=""} 0.0' in metrics.render("")[0].decode()
