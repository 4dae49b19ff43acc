"""A user's own vLLM server with our plugin, middleware and validators, started as `docs/vllm.md` says."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sortserve.engine.vllm.launch import command_line, engine_arguments
from sortserve.engine.vllm.policy import FACTORY
from tests.bundled import FLOOR, FULL, MIDDLE
from tests.vllm.conftest import BUNDLED

READY_SECONDS = 300.0
FLAGS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "67108864"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("own")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"ipc://{folder}/stats"
    given = engine_arguments(
        BUNDLED, cpu=True, decider=FACTORY, decider_options={"policy": "slack"}, stats_address=address
    )
    # `vllm serve` of the CPU build asks for the version of a package `vllm`, which it is not; the module is the same server
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BUNDLED)]
    command += ["--served-model-name", "mine", "--host", "127.0.0.1", "--port", str(port), *FLAGS, *command_line(given)]
    command += ["--enable-scale-out"]  # a path that the middleware does not know
    command += ["--middleware", "sortserve.server.vllm_middleware.LatencyBudgets"]
    command += ["--logits-processors", "sortserve.engine.vllm.validators:SubmodelArguments"]
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    env |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "TORCHDYNAMO_DISABLE": "1"}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=BUNDLED.parent.parent.parent)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def ask(url: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    given = {
        "model": "mine",
        "prompt": "Once upon a time",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    } | body
    return httpx.post(f"{url}/v1/completions", json=given, headers=headers, timeout=120, trust_env=False)


def told(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["kv_transfer_params"]["sortserve"]
    return found


def test_headers_fields_and_arguments_choose_what_runs(url: str) -> None:
    assert told(ask(url))["submodels"] == [[FULL, 8]]
    assert told(ask(url, {"X-Submodel": MIDDLE}))["submodels"] == [[MIDDLE, 8]]
    assert told(ask(url, submodel=FLOOR))["submodels"] == [[FLOOR, 8]]
    assert told(ask(url, vllm_xargs={"sortserve_submodel": MIDDLE}))["submodels"] == [[MIDDLE, 8]]


def test_budgets(url: str) -> None:
    """There is no warm-up: the costs are learned from the first 64 steps."""
    for _ in range(9):
        ask(url, {"X-Submodel": FULL})
    tight = told(ask(url, {"X-Latency-Budget-Ms": "1"}, max_tokens=30))
    assert tight["submodels"] == [[FLOOR, 30]]
    assert told(ask(url, {"X-Latency-Budget-Ms": "3600000"}))["submodels"] == [[FULL, 8]]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"X-Latency-Budget-Ms": "soon"}, {}, 400),
        ({"X-Submodel": "d99"}, {}, 404),
        ({}, {"vllm_xargs": {"sortserve_budget": [1.0, 2.0]}}, 400),
        ({}, {"vllm_xargs": {"sortserve_depth": 3}}, 400),
        ({"X-Latency-Budget-Policy": "strict"}, {}, 400),
    ],
)
def test_mistakes_are_errors_of_the_client(
    url: str, headers: dict[str, str], body: dict[str, Any], status: int
) -> None:
    assert ask(url, headers, **body).status_code == status
    assert told(ask(url))["submodels"] == [[FULL, 8]], "and the engine lives"


def test_the_validator_refuses_where_no_middleware_is(url: str) -> None:
    """On a path that the middleware does not know: the arguments reach the front end as they are."""
    given = {"token_ids": [5, 6, 7], "model": "mine"}
    sampling = {"max_tokens": 2, "extra_args": {"sortserve_slo": "maybe"}}
    refused = httpx.post(
        f"{url}/inference/v1/generate", json=given | {"sampling_params": sampling}, timeout=60, trust_env=False
    )
    assert refused.status_code == 400, refused.text
    assert "sortserve_slo" in refused.text


def test_figures_of_ours_on_vllms_metrics(url: str) -> None:
    ask(url, {"X-Submodel": MIDDLE})
    time_left = time.monotonic() + 60
    wanted = f'sortserve_generation_tokens_total{{model="mine",submodel="{MIDDLE}"}}'
    while wanted not in (text := httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text):
        assert time.monotonic() < time_left, text[-2000:]
        ask(url)  # a report goes with a step
    assert "vllm:num_requests_running" in text
    assert "sortserve_submodel_selected_total" in text
