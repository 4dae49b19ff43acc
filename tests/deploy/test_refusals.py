"""Wrong values: refused before anything is made, with a message that names the value and what to write instead."""

from typing import Any

import pytest

from tests.deploy.conftest import Ask, rendering

MODEL = {"source": "pvc", "path": "m", "pvc": {"existingClaim": "models"}}

# values, and what the message must say; by values.schema.json
BY_SCHEMA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "misspelt": ({"replica": 2}, ("'replica' not allowed",)),
    "misspelt deeper": ({"server": {"kvmemory": "1GiB"}}, ("/server", "'kvmemory' not allowed")),
    "wrong type": ({"replicas": "two"}, ("/replicas", "want integer")),
    "unknown source": (
        {"model": {"source": "s3"}},
        ("/model/source", "'bundled', 'pvc', 'hostPath', 'image', 'download'"),
    ),
    "both scalers": ({"autoscaling": {"kind": "hpa+keda"}}, ("/autoscaling/kind", "'none', 'hpa', 'keda'")),
    "no sleep before SIGTERM": ({"drain": {"preStopSeconds": 0}}, ("/drain/preStopSeconds", "got 0, want 1")),
    "threads": ({"server": {"threads": "all"}}, ("/server/threads", "'auto'", "want integer")),
    "budget of no time": ({"server": {"defaultLatencyBudgetMs": 0}}, ("/server/defaultLatencyBudgetMs", "0")),
    "budget over the server's limit": (
        {"server": {"defaultLatencyBudgetMs": 4e6}},
        ("/server/defaultLatencyBudgetMs", "want 3.6"),
    ),
    "objective of 100 percent": ({"prometheusRule": {"objective": 1}}, ("/prometheusRule/objective", "0.9999")),
    "share as percent": (
        {"autoscaling": {"qualityGivenUp": {"target": 25}}},
        ("/autoscaling/qualityGivenUp/target", "0.9"),
    ),
    "negative GPUs": ({"gpu": {"count": -1}}, ("/gpu/count", "got -1, want 0")),
    "no CPU request": ({"resources": {"requests": {"cpu": None}}}, ("/resources/requests", "'cpu'")),
    "labels that are no strings": ({"podLabels": {"a": 1}}, ("/podLabels/a", "want string")),
    "no such level": ({"server": {"logLevel": "trace"}}, ("/server/logLevel", "'debug', 'info', 'warning', 'error'")),
}

# values that only make sense together, by the templates
BY_CHECKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no folder": ({"model": {"source": "hostPath", "path": "m"}}, ("model.hostPath.path", "absolute path")),
    "no repository": ({"model": {"source": "download"}}, ("model.download.repository", "owner/name")),
    "no reference": ({"model": {"source": "image", "name": "m"}}, ("set model.image.reference",)),
    "no name": ({"model": {"source": "pvc"}}, ("neither model.path nor model.name", "set model.name")),
    "path that leads out": ({"model": {**MODEL, "path": "../etc"}}, ("model.path", "folder inside the volume")),
    "size": ({"server": {"kvMemory": "2 gigs"}}, ("server.kvMemory", "2 gigs", "2GiB")),
    "fixed nothing": ({"server": {"policy": "fixed"}}, ("set server.fixedSubmodel",)),
    "endpoint": ({"server": {"otlpEndpoint": "collector:4318"}}, ("server.otlpEndpoint", "http://collector:4318")),
    "GPUs of native": ({"gpu": {"count": 2}}, ("gpu.count is 2", "set gpu.count to 1, or backend.kind to vllm")),
    "too few GPUs": (
        {"gpu": {"count": 2}, "backend": {"kind": "vllm", "tensorParallelSize": 4}},
        ("is 4, but gpu.count is 2",),
    ),
    "nodes of native": ({"multiNode": {"kind": "leaderWorkerSet"}}, ("only vllm",)),
    "group that does not add up": (
        {
            "gpu": {"count": 8},
            "backend": {"kind": "vllm", "tensorParallelSize": 8},
            "multiNode": {"kind": "leaderWorkerSet"},
        },
        ("multiNode.size x gpu.count is 16 GPUs", "is 8", "must be equal"),
    ),
    "no cluster": ({"backend": {"kind": "vllm"}, "multiNode": {"kind": "ray"}}, ("set multiNode.ray.address",)),
    "upside down": (
        {"autoscaling": {"kind": "keda", "minReplicas": 5}},
        ("minReplicas is 5", "maxReplicas, which is 4"),
    ),
    "another model's ladder": (
        {"autoscaling": {"kind": "keda"}, "model": MODEL},
        ("set model.fullSubmodel", "number of layers"),
    ),
    "nothing to scale on": (
        {"autoscaling": {"kind": "hpa"}, "server": {"policy": "fixed", "fixedSubmodel": "d1"}},
        ("no quality is ever given up",),
    ),
    "no gateway": ({"httpRoute": {"enabled": True}}, ("set httpRoute.parentRefs",)),
    "no picker": ({"inferencePool": {"enabled": True}}, ("set inferencePool.endpointPicker.name",)),
    "test key without keys": ({"test": {"apiKeySecret": {"name": "k"}}}, ("set auth.keys",)),
}


@pytest.mark.parametrize("cases", [BY_SCHEMA, BY_CHECKS], ids=["schema", "checks"])
def test_wrong_values_are_refused_with_help(ask: Ask, cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]]) -> None:
    answers = ask([rendering(values) for values, _ in cases.values()])
    for (name, (_, words)), answer in zip(cases.items(), answers, strict=True):
        assert "refused" in answer, name
        assert [word for word in words if word not in answer["refused"]] == [], (name, answer["refused"])


def test_image_volumes_are_refused_where_there_are_none(ask: Ask) -> None:
    values = {"model": {"source": "image", "name": "m", "image": {"reference": "registry.example/m:1"}}}
    old, new = ask([rendering(values, "1.30"), rendering(values, "1.33")])
    assert (
        "this cluster is Kubernetes v1.30.0 and image volumes need 1.33: use pvc, hostPath or download"
        in old["refused"]
    )
    assert "manifests" in new


def test_a_release_name_may_be_long(ask: Ask) -> None:
    """Names stay within what Kubernetes allows, also those with something added."""
    name = "a-very-long-name-for-a-release-of-this-chart-indeed-ab"[:53]
    values = {"dashboard": {"enabled": True}, "auth": {"keys": '[[keys]]\nname = "a"\nkey = "b"'}}
    [answer] = ask([rendering(values, name=name)])
    names = [document["metadata"]["name"] for file in answer["manifests"].values() for document in file]
    assert max(map(len, names)) <= 63
