"""schemathesis reads /openapi.json and sends what it allows and what it forbids, headers included: 0 findings."""

import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.compat.conftest import KEY
from tests.compat.environments import HERE, environment
from tests.compat.servers import counted
from tests.server.real_server import Server

MAX_EXAMPLES = 200  # per operation
CHECKS = (
    "not_a_server_error",
    "response_schema_conformance",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
SERVED = 100  # generation requests that must have reached the engine, else little was tried


def fuzz(server: Server, folder: Path, *options: str, checks: Sequence[str] = CHECKS) -> float:
    """Run all phases over all operations, and return how many generation requests were served.

    A finding makes the tool exit with 1 and the test fail with what it printed.
    """
    operations = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    num_operations = sum(len(methods) for methods in operations.values())
    before = counted(server, "requests_total", status="200")
    printed = environment("schemathesis").run(
        "schemathesis",
        "run",
        f"{server.url}/openapi.json",
        *("--max-examples", str(MAX_EXAMPLES), "--checks", ",".join(checks)),
        # one worker: with threads Python 3.11.7's parser, which hypothesis uses, raises "recursion depth mismatch"
        *("--workers", "1", "--continue-on-failure", "--suppress-health-check", "all"),
        *options,
        folder=folder,
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        PYTHONPATH=str(HERE),
    )
    print(printed)
    assert num_operations >= 12
    assert f"{num_operations} selected / {num_operations} total" in printed
    assert re.search(rf"Tested: +{num_operations}\n", printed)
    assert re.search(r"\b(\d+) generated, \1 passed(, \d+ skipped)?\n", printed)
    assert counted(server, "requests_total", status="500") == 0
    return counted(server, "requests_total", status="200") - before


@pytest.mark.timeout(600)
def test_without_a_key(server: Server, tmp_path: Path) -> None:
    assert fuzz(server, tmp_path) >= SERVED


@pytest.mark.timeout(600)
def test_with_a_key(keyed_server: Server, tmp_path: Path) -> None:
    """Also `ignored_auth`: what is documented to need the key is refused without it and with a wrong one.

    Two requests may wait on this server, so many are refused with a 429 and fewer are served.
    """
    key = ("--header", f"Authorization: Bearer {KEY}")
    assert fuzz(keyed_server, tmp_path, *key, checks=(*CHECKS, "ignored_auth")) > 0
