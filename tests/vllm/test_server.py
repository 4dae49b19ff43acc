"""`sortserve serve --backend vllm` as a user starts it: answers, budgets, refusals, and an engine core that is killed.

One server for all of it, since starting one takes a minute. Sub-models are read from the bundled ladder.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundled import FLOOR, FULL, LADDER, VOCAB
from tests.server.real_server import Server, children, serving

PROMPT = "Once upon a time"
BACK_SECONDS = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with serving("--backend", "vllm", "--max-model-len", "512") as started:
            yield started


def ask(
    server: Server, headers: dict[str, str] | None = None, path: str = "completions", **body: Any
) -> httpx.Response:
    plain = {"max_tokens": 8, "temperature": 0} | ({} if path != "completions" else {"prompt": PROMPT})
    return httpx.post(f"{server.url}/v1/{path}", json=plain | body, headers=headers, timeout=120, trust_env=False)


def answer(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.smoke
def test_the_full_model_and_each_pinned_sub_model(server: Server) -> None:
    made = answer(ask(server))
    assert made["sortserve"]["submodels"] == {FULL: 8}
    assert made["sortserve"]["kv"] == "exact"
    texts = set()
    for submodel in LADDER:
        made = answer(ask(server, {"X-Submodel": submodel}, max_tokens=12))
        assert made["sortserve"]["submodels"] == {submodel: 12}
        texts.add(made["choices"][0]["text"])
    assert len(texts) > 1


@pytest.mark.smoke
def test_budgets(server: Server) -> None:
    """One that nobody can keep gets the floor and is told so; an ample one gets all; both have a prediction."""
    tight = ask(server, {"X-Latency-Budget-Ms": "1"}, max_tokens=40, ignore_eos=True)
    assert answer(tight)["sortserve"]["met"] is False
    assert tight.headers["X-Submodel"] == FLOOR
    assert float(tight.headers["X-Latency-Predicted-Ms"]) > 1
    ample = answer(ask(server, {"X-Latency-Budget-Ms": "3600000"}))["sortserve"]
    assert ample["met"] is True
    assert ample["submodels"] == {FULL: 8}, "also right after the tight one"


def test_cut(server: Server) -> None:
    headers = {"X-Latency-Budget-Ms": "1000", "X-Latency-Budget-Policy": "cut"}
    made = answer(ask(server, headers, max_tokens=480, ignore_eos=True))
    assert made["choices"][0]["finish_reason"] == "length"
    assert made["sortserve"]["cut"] is True
    assert made["usage"]["completion_tokens"] < 480


def test_a_strict_budget_that_no_server_could_keep(server: Server) -> None:
    headers = {"X-Latency-Budget-Ms": "1", "X-Latency-Budget-Policy": "strict"}
    refused = ask(server, headers, max_tokens=100, ignore_eos=True)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "latency_budget_infeasible"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 5000}, "prompt"),
        ({"prompt": [VOCAB + 7]}, "prompt"),
        ({"submodel": "d99"}, "submodel"),
        ({"temperature": 9}, "temperature"),
    ],
)
def test_what_cannot_be_served(server: Server, body: dict[str, Any], param: str) -> None:
    refused = ask(server, **body)
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == param


def test_log_probabilities_of_prompt_and_answer(server: Server) -> None:
    told = answer(ask(server, echo=True, logprobs=2, max_tokens=3))["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert len(told["tokens"]) == answer(ask(server))["usage"]["prompt_tokens"] + 3
    alone = answer(ask(server, echo=True, logprobs=1, max_tokens=0))["choices"][0]
    assert alone["text"] == PROMPT


def test_seeds_and_several_answers(server: Server) -> None:
    first, again = (answer(ask(server, temperature=1.0, seed=5, n=2, max_tokens=16))["choices"] for _ in range(2))
    assert [each["text"] for each in first] == [each["text"] for each in again]
    assert first[0]["text"] != first[1]["text"]


def test_a_stop_string_ends_the_answer(server: Server) -> None:
    whole = answer(ask(server, max_tokens=24))["choices"][0]["text"]
    word = whole.split()[2]
    stopped = answer(ask(server, max_tokens=24, stop=[word]))["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(word)]


def test_an_answer_that_must_be_json(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    made = ask(
        server,
        path="chat/completions",
        messages=[{"role": "user", "content": "An animal"}],
        max_tokens=40,
        response_format=wanted,
    )
    choice = answer(made)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"])["kind"] in ("cat", "dog")


def test_leaving_early_frees_the_request(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False) as stream:
        next(stream.iter_lines())
    deadline = time.monotonic() + 60
    while server.metric("requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("requests_running") == 0


def test_predictions_and_metrics(server: Server) -> None:
    shown = server.get("/v1/submodels").json()["data"]
    assert [each["id"] for each in shown] == list(LADDER)
    assert all(0 < each["predicted_tpot_ms"] < 60_000 for each in shown)
    text = server.get("/metrics").text
    assert f'sortserve_generation_tokens_total{{model="bundled",submodel="{FULL}"}}' in text
    assert "sortserve_submodel_selected_total{" in text


def test_a_killed_engine_core_is_seen_told_and_replaced(server: Server) -> None:
    """vLLM's engine core is a grandchild of the server: its end is the engine process's, and nothing is left behind."""
    [engine] = children(server.process.pid)
    core = next(pid for pid in children(engine) if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    family = {engine, *children(engine), *children(core)}
    heard: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: heard.append(ask(server, max_tokens=480, ignore_eos=True)))
    asking.start()
    deadline = time.monotonic() + 60
    while not server.metric("requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(core, signal.SIGKILL)
    asking.join(60)
    assert heard[0].status_code == 503
    assert heard[0].json()["error"]["code"] == "engine_failed"
    assert server.get("/health").status_code == 200
    deadline = time.monotonic() + BACK_SECONDS
    while not server.is_ready and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metric("engine_restarts_total") == 1
    assert answer(ask(server))["sortserve"]["submodels"] == {FULL: 8}
    assert not {pid for pid in family if Path(f"/proc/{pid}").exists()}


@pytest.mark.smoke
def test_drained(server: Server) -> None:
    """The last test: SIGTERM ends it in order."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
