"""Manifests for those without Helm: as fresh as the chart, and `kubectl kustomize` makes valid ones of them."""

from typing import Any

import pytest
import yaml

from tests.deploy.conftest import KUBERNETES, Ask
from tests.deploy.manifests import KUSTOMIZE, made
from tests.deploy.test_chart import BUILT_IN
from tests.deploy.tools import kustomize, run

FOLDERS = ("base", "overlays/cpu", "overlays/gpu")


def built(folder: str) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder."""
    return list(yaml.safe_load_all(run(*kustomize(), str(KUSTOMIZE / folder))))


def test_they_follow_the_chart() -> None:
    for path, text in made().items():
        assert path.read_text() == text, f"{path} is behind the chart: python -m tests.deploy.manifests"


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_kustomize_makes_follows_the_schemas(folder: str, ask: Ask) -> None:
    found = [document for document in built(folder) if document["apiVersion"] in BUILT_IN]
    cases = [(document, kube) for document in found for kube in KUBERNETES]
    answers = ask([{"check": {"manifest": document, "kube": kube}} for document, kube in cases])
    assert [answer["wrong"] for answer in answers if answer["wrong"]] == []
    assert len(found) >= 4


def test_overlays_change_what_they_say() -> None:
    [cpu] = [one for one in built("overlays/cpu") if one["kind"] == "Deployment"]
    [gpu] = [one for one in built("overlays/gpu") if one["kind"] == "Deployment"]
    assert cpu["spec"]["replicas"] == 2
    assert cpu["metadata"]["namespace"] == gpu["metadata"]["namespace"] == "sortserve"
    [server] = gpu["spec"]["template"]["spec"]["containers"]
    assert server["args"][:2] == ["serve", "/models/model"]
    assert server["args"][-1] == "--kv-memory=40GiB"
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert server["image"] == "registry.example/sortserve:0.1.0-cuda"
