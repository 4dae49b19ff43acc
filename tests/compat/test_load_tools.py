"""GuideLLM and AIPerf, with the commands of the HTTP contract: every request succeeds and carries its budget."""

import json
from pathlib import Path

from sortserve.server.cli import BUNDLED
from tests.compat.environments import environment
from tests.compat.servers import counted
from tests.server.real_server import Server

NUM_REQUESTS = 40
OUTPUT_TOKENS = 16


def test_guidellm(server: Server, tmp_path: Path) -> None:
    backend = {
        "kind": "openai_http",
        "target": server.url,
        "model": "bundled",
        "extras": {"headers": {"X-Latency-Budget-Ms": "300"}},
    }
    before = counted(server, "budget_requests_total")
    environment("guidellm").run(
        "guidellm",
        "run",
        *("--backend", json.dumps(backend)),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={BUNDLED}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={OUTPUT_TOKENS}"),
        *("--output", "kind=json,path=out.json"),
        "--disable-console-interactive",
        folder=tmp_path,
    )
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (NUM_REQUESTS, 0, 0)
    for request in benchmark["requests"]["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT_TOKENS, "as the server's usage tells"
    first = benchmark["metrics"]["time_to_first_token_ms"]["successful"]["median"]
    assert 0 < first < benchmark["metrics"]["request_latency"]["successful"]["median"] * 1e3
    assert counted(server, "budget_requests_total") == before + NUM_REQUESTS


def test_aiperf(server: Server, tmp_path: Path) -> None:
    before = counted(server, "budget_requests_total")
    environment("aiperf").run(
        "aiperf",
        "profile",
        *("--model", "bundled", "--url", server.url, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", str(BUNDLED), "--isl", "64", "--osl", str(OUTPUT_TOKENS)),
        *("--concurrency", "4", "--request-count", str(NUM_REQUESTS)),
        *("--header", "X-Latency-Budget-Ms:500ms", "--extra-inputs", "ignore_eos:true"),
        *("--ui", "none", "--no-gpu-telemetry", "--artifact-dir", str(tmp_path / "out")),
        folder=tmp_path,
    )
    found = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert found["is_complete"]
    assert found["request_count"]["avg"] == NUM_REQUESTS
    assert found["error_summary"] == []
    assert found["request_error_rate"]["avg"] == 0
    assert found["usage_completion_tokens"]["avg"] == OUTPUT_TOKENS
    assert 0 < found["time_to_first_token"]["avg"] < found["request_latency"]["avg"]
    assert counted(server, "budget_requests_total") == before + NUM_REQUESTS
