"""A real Prometheus scrapes a real server: what dashboard and rules ask for is there, and nothing in it is malformed."""

import json
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundled import LADDER
from tests.deploy.conftest import only
from tests.deploy.expressions import family, of_dashboard, of_rules, series
from tests.deploy.ports import free_port
from tests.deploy.tools import CHART, run, system_tool
from tests.server.real_server import Server, serving

SCRAPED = {"namespace", "instance", "job", "pod"}  # labels that scraping adds
WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer of its API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrapes `target` every second, with our rules evaluated as often."""
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(CHART / "files" / "rules.yaml")],
        "scrape_configs": [
            {"job_name": "sortserve", "static_configs": [{"targets": [target], "labels": {"namespace": "test"}}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [
        system_tool("prometheus", "prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


def use(server: Server) -> None:
    """Requests of all kinds that leave a mark in the metrics."""
    body = {"model": "bundled", "prompt": "Once upon a time", "max_tokens": 24}
    for headers in (
        {},
        {"X-Latency-Budget-Ms": "5000"},
        {"X-Latency-Budget-Ms": "60"},
        {"X-Latency-Budget-Ms": "1", "X-Latency-Budget-Policy": "strict"},
        {"X-Submodel": LADDER[1]},
    ):
        status = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code
        assert status == (400 if "X-Latency-Budget-Policy" in headers else 200)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Has answered some requests."""
    with serving() as started:
        use(started)
        yield started


@pytest.fixture(scope="module")
def scraping(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Has scraped and evaluated a few times."""
    with prometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://")) as running:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                if running.get("query", query="count_over_time(sortserve_model_ready[1m]) >= 4")["result"]:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "Prometheus has not scraped the server"
            time.sleep(0.2)
        use(server)
        time.sleep(2)  # two scrapes more, so that rates have something to tell
        yield running


def test_metrics_are_clean(server: Server) -> None:
    """As Prometheus' own linter sees them."""
    text = httpx.get(f"{server.url}/metrics").text
    assert run(system_tool("promtool", "prometheus"), "check", "metrics", text=text) == ""


def test_what_is_asked_for_exists(scraping: Prometheus) -> None:
    """Joins the list of what the server has, as scraped, with the series that dashboard and rules name."""
    there = {family(entry["metric"]) for entry in scraping.get("targets/metadata")}
    asked = [expression for panel in of_dashboard().values() for expression in panel] + [*of_rules().values()]
    missing = {name for expression in asked for name, _ in series(expression) if family(name) not in there}
    assert missing == set()
    assert family("sortserve_made_up_total") not in there


def test_labels_that_are_asked_for_exist(scraping: Prometheus) -> None:
    asked = [expression for panel in of_dashboard().values() for expression in panel] + [*of_rules().values()]
    for name, labels in {(name, tuple(labels)) for each in asked for name, labels in series(each)}:
        known = {label for one in scraping.get("series", **{"match[]": name}) for label in one} | SCRAPED
        assert not known - SCRAPED or set(labels) <= known, (name, labels, known)


def test_every_panel_can_be_drawn(scraping: Prometheus) -> None:
    """Each expression is valid, and all but a few panels have something to show after these requests."""
    empty = {
        title
        for title, expressions in of_dashboard().items()
        for expression in expressions
        if not scraping.get("query", query=expression)["result"]
    }
    # no switch, no drop by the engine and no refusal need have happened
    assert empty <= {"Switches and refills", "Refused, by reason"}


def test_queries_of_the_scaler_answer_with_one_number(
    scraping: Prometheus, rendered: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """KEDA takes exactly one; also where there is nothing yet, which must be 0 and not nothing."""
    triggers = only(rendered["keda-monitoring", "1.37"], "ScaledObject")["spec"]["triggers"]
    assert [trigger["name"] for trigger in triggers] == ["quality-given-up", "waiting", "running"]
    for trigger in triggers:
        for namespace in ("test", "nowhere"):
            query = trigger["metadata"]["query"].replace('"inference"', f'"{namespace}"')
            [(_, value)] = [one["value"] for one in scraping.get("query", query=query)["result"]]
            assert 0 <= float(value) <= (1 if trigger["metricType"] == "Value" else 64), (trigger["name"], value)
            assert namespace == "test" or float(value) == 0, trigger["name"]
    quality = triggers[0]["metadata"]["query"].replace('"inference"', '"test"')
    assert float(scraping.get("query", query=quality)["result"][0]["value"][1]) > 0  # some budgets were tight


def test_rules_evaluate(scraping: Prometheus) -> None:
    groups = scraping.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == set(of_rules())
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")] == []
    assert {rule["health"] for rule in rules} == {"ok"}
    assert scraping.get("query", query="sortserve:budget_objective:ratio")["result"][0]["value"][1] == "0.95"
