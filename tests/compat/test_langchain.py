"""LangChain's OpenAI models."""

import json

import pytest

from tests.bundled import FLOOR, FULL
from tests.compat.environments import HERE, environment
from tests.compat.servers import counted
from tests.server.real_server import Server


def test_langchain(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    budgets = counted(server, "budget_requests_total")
    script = str(HERE / "clients" / "langchain_client.py")
    tool = environment("langchain-openai")
    seen = json.loads(tool.run("python", script, server.url, folder=tmp_path_factory.mktemp("langchain")))

    text = seen["invoke"]["content"]
    assert text
    assert seen["invoke"]["usage"]["output_tokens"] == 12
    assert seen["invoke"]["metadata"]["finish_reason"] == "length"
    assert seen["invoke"]["metadata"]["system_fingerprint"].endswith(f"-{FULL}")

    assert len(seen["stream"]["contents"]) > 2, "it came in pieces"
    assert "".join(seen["stream"]["contents"]) == "".join(seen["astream"]) == seen["ainvoke"] == text
    counts = ("input_tokens", "output_tokens", "total_tokens")
    assert [seen["stream"]["usage"][name] for name in counts] == [seen["invoke"]["usage"][name] for name in counts]
    assert seen["stream"]["metadata"]["finish_reason"] == "length"

    assert seen["batch"][0] == seen["batch"][2] == text
    assert len(seen["batch"]) == 3
    assert seen["messages"] is not None

    assert seen["budget"]["headers"]["x-latency-budget-ms"] == "30000"
    assert seen["budget"]["headers"]["x-latency-budget-status"] == "met"
    assert seen["budget"]["content"] == text
    assert counted(server, "budget_requests_total") == budgets + 1

    assert seen["pinned"].endswith(f"-{FLOOR}")
    assert "".join(seen["completion_stream"]) == seen["completion"] != ""
