"""The chart: every document it makes follows its schema, for the oldest and the newest Kubernetes; it lints clean."""

import json
from typing import Any

import jsonschema
import pytest

from tests.deploy.conftest import EXAMPLES, KUBERNETES, NEEDS_133, Ask, documents, example, only, rendering
from tests.deploy.tools import CHART, CRDS, crd_validator, run

Rendered = dict[tuple[str, str], dict[str, Any]]
BUILT_IN = ("v1", "apps/v1", "autoscaling/v2", "policy/v1", "networking.k8s.io/v1")
POOL = "inference.networking.k8s.io/v1 InferencePool"
SCHEMAS: dict[str, Any] = json.loads((CRDS / "schemas.json").read_text())


def makable(rendered: Rendered) -> list[tuple[str, str, dict[str, Any]]]:
    """(example, Kubernetes, document) of everything that is made; what a version cannot have is refused elsewhere."""
    return [
        (name, kube, document)
        for (name, kube), answer in rendered.items()
        if not (name in NEEDS_133 and kube == "1.30")
        for document in documents(answer)
    ]


def pods_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Manifests of the pods that a document makes, as pods of their own, so that their schema can be asked."""
    spec = document.get("spec", {})
    group = spec.get("leaderWorkerTemplate", {})
    templates = [spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates if template]
    for pod in pods:
        pod["metadata"] = {"name": "pod", **pod.get("metadata", {})}
    return [*pods, document] if document["kind"] == "Pod" else pods


def test_there_are_enough_examples() -> None:
    assert len(EXAMPLES) >= 6


def test_built_in_kinds_follow_their_schemas(rendered: Rendered, ask: Ask) -> None:
    """Strictly: a field that a kind does not have in that version of Kubernetes is an error too."""
    cases = [(name, kube, doc) for name, kube, doc in makable(rendered) if doc["apiVersion"] in BUILT_IN]
    cases += [
        (name, kube, pod)
        for name, kube, document in makable(rendered)
        if document["kind"] == "LeaderWorkerSet"
        for pod in pods_of(document)
    ]
    answers = ask([{"check": {"manifest": document, "kube": kube}} for _, kube, document in cases])
    wrong = [
        (name, kube, document["kind"], answer["wrong"])
        for (name, kube, document), answer in zip(cases, answers, strict=True)
        if answer["wrong"] is not None
    ]
    assert wrong == []
    assert len(cases) > 80


def test_custom_resources_follow_their_schemas(rendered: Rendered) -> None:
    cases = [(name, doc) for name, kube, doc in makable(rendered) if doc["apiVersion"] not in BUILT_IN]
    told = json.loads(run(*crd_validator(), text=json.dumps([document for _, document in cases])))
    seen = set()
    for (name, document), wrong in zip(cases, told, strict=True):
        kind = f"{document['apiVersion']} {document['kind']}"
        seen.add(document["kind"])
        if wrong == "unknown":
            jsonschema.validate(document["spec"], SCHEMAS[kind])
            wrong = None
        assert wrong is None, (name, kind, wrong)
    assert seen == {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "InferencePool", "LeaderWorkerSet"}


def test_the_checks_can_fail(rendered: Rendered, ask: Ask) -> None:
    """Each of the three tools is shown a document with one thing wrong."""
    pod = only(rendered["default", "1.37"], "Deployment")
    pod["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    monitor = only(rendered["keda-monitoring", "1.37"], "PodMonitor")
    broken = {**monitor, "spec": {**monitor["spec"], "podMetricsEndpoints": [{"port": 8000}]}}
    pool = only(rendered["gateway", "1.37"], "InferencePool")["spec"]
    [answer] = ask([{"check": {"manifest": pod, "kube": "1.37"}}])
    del pod["spec"]["template"]["spec"]["containers"][0]["livenesProbe"]
    assert "livenesProbe" in answer["wrong"]
    assert json.loads(run(*crd_validator(), text=json.dumps([broken])))[0] is not None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**pool, "targetPorts": [{"number": 0}]}, SCHEMAS[POOL])


def test_lint_is_clean(ask: Ask) -> None:
    """Not even a warning; the one thing lint may tell is that no icon is there."""
    cases = [{}, *map(example, EXAMPLES)]
    answers = ask([{"lint": {"chart": str(CHART), "values": values, "kube": "1.37"}} for values in cases])
    told = [message["error"] for answer in answers for message in answer["messages"]]
    assert {message for message in told if "icon is recommended" not in message} == set()


@pytest.mark.parametrize("kube", KUBERNETES)
def test_pods_may_do_little(rendered: Rendered, kube: str) -> None:
    """Unprivileged, on a read-only root: every pod, the test's and the workers' included."""
    for name, version, document in makable(rendered):
        for pod in pods_of(document) if version == kube else ():
            spec = pod["spec"]
            assert spec["automountServiceAccountToken"] is False, name
            assert spec["securityContext"]["runAsNonRoot"] is True, name
            assert spec["securityContext"]["runAsUser"] == 10001, name
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
            for container in [*spec.get("initContainers", ()), *spec["containers"]]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"] is True, (name, container["name"])
                assert security["allowPrivilegeEscalation"] is False, (name, container["name"])
                assert security["capabilities"] == {"drop": ["ALL"]}, (name, container["name"])
                assert container["resources"]["limits"]["memory"], (name, container["name"])
                assert "cpu" not in container["resources"]["limits"], (name, container["name"])


def test_probes_and_drain(rendered: Rendered) -> None:
    pod = only(rendered["default", "1.37"], "Deployment")["spec"]["template"]["spec"]
    [server] = pod["containers"]
    assert server["startupProbe"]["httpGet"]["path"] == "/ready"
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] == 300
    assert (server["readinessProbe"]["httpGet"]["path"], server["readinessProbe"]["failureThreshold"]) == ("/ready", 1)
    assert (server["livenessProbe"]["httpGet"]["path"], server["livenessProbe"]["failureThreshold"]) == ("/health", 6)
    assert server["lifecycle"] == {"preStop": {"sleep": {"seconds": 15}}}
    assert "--shutdown-timeout=55" in server["args"]
    assert pod["terminationGracePeriodSeconds"] == 75
    strategy = only(rendered["default", "1.37"], "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}


def test_scaling_and_disruption(rendered: Rendered) -> None:
    """One kind of autoscaling at a time, and then no number of replicas that `helm upgrade` would reset."""
    for name, kind in (("keda-monitoring", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")):
        answer = rendered[name, "1.37"]
        kinds = [document["kind"] for document in documents(answer)]
        assert kinds.count("ScaledObject") + kinds.count("HorizontalPodAutoscaler") == 1 == kinds.count(kind)
        assert "replicas" not in only(answer, "Deployment")["spec"]
        assert only(answer, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert "PodDisruptionBudget" not in [document["kind"] for document in documents(rendered["default", "1.37"])]
    metrics = only(rendered["hpa", "1.37"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metrics[0]["external"]["target"]["value"] == "325m"  # 0.1 + 0.25 x 0.9


def test_the_route_touches_no_header_and_offers_no_probes(rendered: Rendered) -> None:
    [rule] = only(rendered["gateway", "1.37"], "HTTPRoute")["spec"]["rules"]
    assert set(rule) == {"matches", "backendRefs", "timeouts"}
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert rule["backendRefs"][0]["kind"] == "InferencePool"
    [server] = only(rendered["gateway", "1.37"], "Deployment")["spec"]["template"]["spec"]["containers"]
    assert "--metrics-compat=vllm" in server["args"]
    pool = only(rendered["gateway", "1.37"], "InferencePool")["spec"]
    pods = only(rendered["gateway", "1.37"], "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert pool["selector"]["matchLabels"].items() <= pods.items()


def test_gpus_are_a_limit(rendered: Rendered) -> None:
    for name, count in (("gpu-pvc", "1"), ("vllm-gpus", "4"), ("default", None), ("vllm-ray", None)):
        [server] = only(rendered[name, "1.37"], "Deployment")["spec"]["template"]["spec"]["containers"]
        assert server["resources"]["limits"].get("nvidia.com/gpu") == count, name
        assert "nvidia.com/gpu" not in server["resources"].get("requests", {}), name


def test_what_pods_read_rolls_them(ask: Ask) -> None:
    """A changed ladder or keys file changes the pod's annotations, and so replaces the pods; nothing else does."""
    keys = example(next(path for path in EXAMPLES if path.stem == "hostpath-keys"))
    ladder = {"model": {"ladder": {"format": "sortserve-ladder"}}}
    changed = {**keys, "auth": {"keys": keys["auth"]["keys"].replace("600", "700")}}
    cases = [keys, keys, changed, ladder, {"model": {"ladder": {"format": "another"}}}, {"service": {"port": 81}}, {}]
    told = [only(answer, "Deployment")["spec"]["template"] for answer in ask([rendering(case) for case in cases])]
    assert told[0] == told[1] != told[2]
    assert told[3] != told[4]
    assert told[5] == told[6]


def test_notes_say_what_matters(rendered: Rendered) -> None:
    default, gateway = rendered["default", "1.37"]["notes"], rendered["hostpath-keys", "1.37"]["notes"]
    assert "everybody who reaches the service may use it" in default
    assert "X-Latency-Budget-Ms" in default
    assert "Authorization: Bearer" in gateway
    assert "everybody who reaches" not in gateway
    assert "podMonitor.enabled is false" not in rendered["keda-monitoring", "1.37"]["notes"]
