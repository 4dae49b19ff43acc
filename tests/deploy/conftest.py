"""Fixtures of the suite: the chart as Helm renders it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import CHART, HERE, ROOT, python_tool, run

EXAMPLES = sorted((ROOT / "deploy" / "helm" / "examples").glob("*.yaml"))
KUBERNETES = ("1.30", "1.37")
NEEDS_133 = {"image-volume"}

Ask = Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ask() -> Ask:
    """Questions for helm_tool.py, many at a time: starting it takes a second."""

    def answers(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        told = run(python_tool("python"), str(HERE / "helm_tool.py"), text=json.dumps(list(questions)))
        found: list[dict[str, Any]] = json.loads(told)
        assert len(found) == len(questions)
        return found

    return answers


def rendering(values: dict[str, Any], kube: str = KUBERNETES[-1], name: str = "demo") -> dict[str, Any]:
    """The question for what values make."""
    given = {"chart": str(CHART), "values": values, "kube": kube, "name": name, "namespace": "inference"}
    return {"render": given}


def example(path: Path) -> dict[str, Any]:
    """The values of an example."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


@pytest.fixture(scope="session")
def rendered(ask: Ask) -> dict[tuple[str, str], dict[str, Any]]:
    """(example, Kubernetes) -> the answer, of all examples and of no values, which is called `default`."""
    cases = {"default": {}, **{path.stem: example(path) for path in EXAMPLES}}
    keys = [(name, kube) for name in cases for kube in KUBERNETES]
    return dict(zip(keys, ask([rendering(cases[name], kube) for name, kube in keys]), strict=True))


def documents(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """All documents of an answer. Fails with what Helm said if there are none."""
    assert "manifests" in answer, answer.get("refused")
    return [document for file in answer["manifests"].values() for document in file]


def only(answer: dict[str, Any], kind: str) -> dict[str, Any]:
    """The one document of a kind."""
    [found] = [document for document in documents(answer) if document["kind"] == kind]
    return found
