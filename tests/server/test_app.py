"""Answers that are not streamed, the catalogue, the tokenizer's paths, metrics, and what reaches the back end."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import sortserve
from sortserve.engine.protocol import FailedEvent
from sortserve.server.app import create_app
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import EOS, MAX_MODEL_LEN, FakeBackend, byte_tokenizer, open_client, served, state_of

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json={"prompt": "x", **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# --- the answer


async def test_completion(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "say", "max_tokens": 5})
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert (body["model"], body["id"][:5]) == ("fake", "cmpl-")
    assert body["system_fingerprint"] == f"sortserve-{sortserve.__version__}-d4"
    assert answer.headers["X-Submodel"] == "d4"
    assert "queue;dur=1.0" in answer.headers["Server-Timing"]
    assert "decode;dur=" in answer.headers["Server-Timing"]
    assert "X-Submodel" in answer.headers["Access-Control-Expose-Headers"]
    assert "X-Latency-Budget-Status" not in answer.headers


async def test_chat(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    prompt = b"user: hi\nassistant:"
    assert backend.requests[0].prompt == tuple(prompt)
    assert backend.requests[0].sampling.max_tokens == MAX_MODEL_LEN - len(prompt)
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in "hi"]}]}
    await client.post("/v1/chat/completions", json=parts | {"max_completion_tokens": 3})
    assert backend.requests[1].prompt == tuple(prompt)
    assert backend.requests[1].sampling.max_tokens == 3


async def test_usage_counts_a_prompt_once(client: httpx.AsyncClient) -> None:
    """Three answers to a prompt of three tokens, two of them cached, were told as six cached of three."""
    usage = (await complete(client, n=3, prompt="say", max_tokens=2))["usage"]
    assert usage["prompt_tokens"] == 3
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    usage = (await complete(client, n=2, prompt=["say", "say"], max_tokens=2))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


async def test_told(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.submodels = ("d4", "d4", "d2")
    told = (await complete(client, max_tokens=6))["sortserve"]
    assert told["submodels"] == {"d4": 4, "d2": 2}
    assert told["switches"] == 3
    assert (told["refilled_tokens"], told["kv"], told["met"], told["budget_ms"]) == (3, "exact", None, None)
    assert told["elapsed_ms"] >= told["ttft_ms"] > 0
    assert told["tpot_ms"] >= 0


async def test_stop_string_across_tokens_aborts_and_is_told(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = await complete(client, stop=["o w", "zzz"], latency_budget_ms=60_000, logprobs=0)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hell", "stop")
    assert choice["logprobs"]["tokens"] == list("hell")
    assert body["usage"]["completion_tokens"] == 7
    told = body["sortserve"]
    assert (told["submodels"], told["met"], told["kv"]) == ({"d4": 7}, True, "reuse")
    assert told["refilled_tokens"] == 3
    assert backend.aborted == [backend.requests[0].request_id]
    assert backend.running == 0


async def test_characters_over_tokens(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.answer = (*"é中😀".encode(), EOS)
    assert (await complete(client))["choices"][0]["text"] == "é中😀"
    assert (await complete(client, max_tokens=3))["choices"][0]["text"] == "é\ufffd"


async def test_several_prompts_and_choices(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = await complete(client, prompt=["a", "b"], n=2, seed=2**63 - 1, max_tokens=1)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 4
    asked = backend.requests
    assert [request.prompt for request in asked] == [(97,), (97,), (98,), (98,)]
    assert [request.sampling.seed for request in asked] == [2**63 - 1, 2**63 - 1 + 0x9E3779B97F4A7C15 - 2**64] * 2
    assert len({request.request_id for request in asked}) == 4
    assert len({request.arrival for request in asked}) == 1


async def test_token_id_prompts(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client, prompt=[1, 2])
    await complete(client, prompt=[[1], [2, EOS]])
    assert [request.prompt for request in backend.requests] == [(1, 2), (1,), (2, EOS)]


async def test_sampling_reaches_the_back_end(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 4,
        "ignore_eos": True,
        "min_tokens": 2,
    }
    await complete(client, **fields, logit_bias={"5": -100}, stop="zz", top_unknown=1)
    sampling = backend.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.logit_bias, sampling.stop, sampling.max_tokens) == ({5: -100.0}, ("zz",), 16)
    await complete(client, top_k=-1, temperature=None, stop=None)
    assert backend.requests[1].sampling.top_k == 0
    assert backend.requests[1].sampling.temperature == 1.0


# --- log-probabilities


async def test_legacy_logprobs(client: httpx.AsyncClient) -> None:
    body = await complete(client, max_tokens=2, logprobs=1)
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["h", "e"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"i": -0.5, "h": -1.0}, {"f": -0.5, "e": -1.0}],
        "text_offset": [0, 1],
    }


async def test_chat_logprobs(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 3})).json()
    first = body["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("h", -1.0, [104])
    assert [top["token"] for top in first["top_logprobs"]] == ["i", "h", "j"]
    assert first["top_logprobs"][2]["logprob"] == -9999.0


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_prompt_logprobs_as_lm_eval_asks(client: httpx.AsyncClient, max_tokens: int) -> None:
    body = await complete(client, prompt=list(b"abc"), echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    choice = body["choices"][0]
    assert choice["text"] == "abc" + "h" * max_tokens
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("abc" + "h" * max_tokens)
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -1.0][: 3 + max_tokens]
    assert logprobs["top_logprobs"][:2] == [None, {"c": -0.5, "b": -1.0}]
    assert logprobs["text_offset"] == [0, 1, 2, 3][: 3 + max_tokens]


async def test_echo_without_logprobs(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await complete(client, prompt="é ", echo=True, max_tokens=2))["choices"][0]["text"] == "é he"
    assert (await complete(client, prompt="é ", echo=True, max_tokens=0))["choices"][0]["text"] == "é "
    assert backend.requests[0].sampling.prompt_logprobs is None
    offsets = (await complete(client, prompt=[EOS, 97], echo=True, logprobs=0, max_tokens=1))["choices"][0]["logprobs"]
    assert (offsets["tokens"], offsets["text_offset"]) == (["<eos>", "a", "h"], [0, 5, 6])


# --- catalogue and tokenizer


async def test_models(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert [model["id"] for model in body["data"]] == ["fake", "fake:d2", "fake:d4-w50", "fake:d4"]
    assert {model["max_model_len"] for model in body["data"]} == {MAX_MODEL_LEN}
    assert (await client.get("/v1/models/fake:d2")).json()["parent"] == "fake"


async def test_submodels(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/submodels")).json()
    first = body["data"][0]
    assert (first["id"], first["depth"], first["width"]) == ("d2", 2, 128)
    assert first["quality"] == {"metric": "agreement", "value": 0.8, "low": 0.75, "high": 0.85}
    assert (first["predicted_ttft_ms"], first["predicted_tpot_ms"]) == (10.0, 2.0)
    assert first["skips"] == {"attention": [], "ffn": []}
    assert body["data"][1]["predicted_ttft_ms"] is None


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"prompt": "é<eos>"})).json()
    assert (tokens["tokens"], tokens["count"], tokens["max_model_len"]) == ([195, 169, EOS], 3, MAX_MODEL_LEN)
    back = await client.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "é<eos>"}
    for wrong in ([258], [-1], ["a"], 5):
        assert (await client.post("/detokenize", json={"tokens": wrong})).status_code == 400
    assert (await client.post("/tokenize", json={"prompt": 5})).status_code == 400
    info = (await client.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": sortserve.__version__}


# --- ids, metrics


async def test_request_id(client: httpx.AsyncClient) -> None:
    ask = {"prompt": "x"}
    echoed = await client.post("/v1/completions", json=ask | {"request_id": "b"}, headers={"X-Request-Id": "a-1"})
    assert echoed.headers["X-Request-Id"] == "a-1"
    from_body = await client.post("/v1/completions", json=ask | {"request_id": "b"})
    assert from_body.headers["X-Request-Id"] == "b"
    for unusable in ("x" * 200, "a b"):
        made = await client.get("/version", headers={"X-Request-Id": unusable})
        assert made.headers["X-Request-Id"].startswith("req-")


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "model")
            found[f"{sample.name.removeprefix('sortserve_')}{{{labels}}}"] = sample.value
    return found


async def test_metrics(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client, latency_budget_ms=60_000)
    await client.post("/v1/completions", json={"prompt": ""})
    backend.refuse = FailedEvent("", "OverloadedError", "full")
    await client.post(
        "/v1/completions", json={"prompt": "x", "latency_budget_ms": 5, "latency_budget_policy": "strict"}
    )
    found = await samples(client)
    common = "endpoint=completions,finish_reason="
    assert found[f"requests_total{{{common}stop,status=200,submodel=d4}}"] == 1
    assert found[f"requests_total{{{common}none,status=400,submodel=none}}"] == 1
    assert found[f"requests_total{{{common}none,status=429,submodel=none}}"] == 1
    assert found["budget_requests_total{outcome=met,policy=best-effort,submodel=d4}"] == 1
    assert found["budget_requests_total{outcome=refused,policy=strict,submodel=none}"] == 1
    assert found["time_to_first_token_seconds_count{submodel=d4}"] == 1
    assert found["time_per_output_token_seconds_count{submodel=d4}"] == 1
    assert found["request_queue_seconds_count{submodel=d4}"] == 1
    assert found["budget_slack_ratio_count{submodel=d4}"] == 1
    assert found["latency_prediction_error_ratio_count{submodel=d4}"] == 1
    assert found["kv_cache_usage_ratio{}"] == 0.25
    assert found["model_ready{}"] == found["requests_waiting{}"] == 1
    assert found["generation_tokens_total{submodel=d4}"] == 5
    assert found["submodel_selected_total{reason=no-budget,submodel=d4}"] == 2
    assert found["submodel_switches_total{direction=down}"] == 1
    assert found["submodel_switches_total{direction=up}"] == 0, "told before there is one"
    assert found["requests_dropped_total{reason=queue-full}"] == 1
    assert found[f"build_info{{python={__import__('platform').python_version()},version={sortserve.__version__}}}"] == 1
    bounds = [name for name in found if name.startswith("request_duration_seconds_bucket") and "d4" in name]
    assert "le=0.001" in bounds[0]


async def test_quality_and_goodput(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    """d2 has 0.8, d4-w50 0.9, d4 1: what is finished counts, in time or late or without a budget; goodput only
    what was in time; and what is refused or breaks is worth nothing."""
    await complete(client, latency_budget_ms=60_000, submodel="d2")
    backend.submodels = ("d4-w50", "d4")
    await complete(client, latency_budget_ms=60_000)
    await complete(client)
    await complete(client, latency_budget_ms=0.001, submodel="d2")
    backend.fail_after = 2
    await client.post("/v1/completions", json={"prompt": "x", "latency_budget_ms": 60_000})
    found = await samples(client)
    mixed = (6 * 0.9 + 5 * 1.0) / 11
    assert found["quality_ratio_count{outcome=met}"] == 2
    assert found["quality_ratio_sum{outcome=met}"] == pytest.approx(0.8 + mixed)
    assert found["quality_ratio_sum{outcome=missed}"] == pytest.approx(0.8)
    assert found["quality_ratio_sum{outcome=no-budget}"] == pytest.approx(mixed)
    goodput = {name: value for name, value in found.items() if name.startswith("goodput_total")}
    assert goodput == pytest.approx({"goodput_total{submodel=d2}": 0.8, "goodput_total{submodel=d4-w50}": mixed})


async def test_metrics_in_openmetrics(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


async def test_metrics_survive_an_engine_that_hangs(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("sortserve.server.routes._STATS_SECONDS", 0.01)
    monkeypatch.setattr(state_of(client).backend, "stats", never)
    assert (await samples(client))["model_ready{}"] == 1


async def test_apps_share_no_metrics() -> None:
    async with open_client(FakeBackend()) as one, open_client(FakeBackend()) as other:
        await complete(one)
        assert any(name.startswith("requests_total") for name in await samples(one))
        assert not any(name.startswith("requests_total") for name in await samples(other))


async def test_cors_only_where_asked_for() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    async with open_client(FakeBackend()) as client:
        assert "Access-Control-Allow-Origin" not in (await client.get("/version", headers=ask)).headers
    options = ServerOptions(allow_origins=("https://a.example",), api_keys=("k",))
    async with open_client(FakeBackend(), options) as client:
        assert (await client.options("/v1/completions", headers=ask)).status_code == 200
        answer = await client.get("/version", headers=ask)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"


# --- the official client, over a socket


def test_openai_client() -> None:
    app = create_app(FakeBackend(), byte_tokenizer(), ServerOptions(api_keys=("key",)))
    with served(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        assert next(iter(client.models.list())).id == "fake"
        completion = client.completions.create(model="fake", prompt="x", max_tokens=5, logprobs=2)
        assert completion.choices[0].text == "hello"
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens == list("hello")
        chat = client.chat.completions.create(
            model="fake:d2",
            messages=[{"role": "user", "content": "hi"}],
            logprobs=True,
            top_logprobs=1,
            extra_headers={"X-Latency-Budget-Ms": "60s"},
        )
        assert chat.choices[0].message.content == "hello world"
        assert (chat.model_extra or {})["sortserve"]["met"] is True
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 11
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="fake", prompt="x" * 999)
        assert bad.value.code == "context_length_exceeded"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
