"""Runs in `.venv-deploy`: Helm's own engine and Kubernetes' own schemas, asked through standard input and output.

    {"render": {"chart", "values", "kube", "name", "namespace"}} -> {"manifests": {file: [documents]}} | {"refused": why}
    {"lint": {"chart", "values", "kube"}}                        -> {"messages": [{"severity", "path", "error"}]}
    {"check": {"manifest", "kube"}}                              -> {"wrong": null | why}

A JSON list of such questions, a list of answers. `kube` is like 1.30.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import helm_python
import kubernetes_validate
import yaml
from helm_python import _native


def render(chart: str, values: dict[str, Any], kube: str, name: str, namespace: str) -> dict[str, Any]:
    """What `helm template` makes, each file's documents parsed."""
    # the public method offers no version of Kubernetes; the library below it does
    options = json.dumps({"name": name, "namespace": namespace, "kube_version": f"v{kube}.0"})
    try:
        with helm_python.Chart.load(chart) as loaded:
            loaded.validate_schema(values)
            files = json.loads(_native.call_string("helm_render", loaded._raw(), json.dumps(values), options))
    except helm_python.HelmError as error:
        return {"refused": str(error)}
    notes = {file: text for file, text in files.items() if file.endswith("NOTES.txt")}
    documents = {
        file.partition("/templates/")[2]: [one for one in yaml.safe_load_all(text) if one]
        for file, text in files.items()
        if file not in notes and text.strip()
    }
    return {"manifests": {file: made for file, made in documents.items() if made}, "notes": "".join(notes.values())}


def lint(chart: str, values: dict[str, Any], kube: str) -> dict[str, Any]:
    """What `helm lint --strict` says."""
    return {"messages": helm_python.lint(chart, values, strict=True, kube_version=f"v{kube}.0")["messages"]}


def check(manifest: dict[str, Any], kube: str) -> dict[str, Any]:
    """Whether the manifest follows the schema of its kind, without a field that the kind does not have."""
    try:
        kubernetes_validate.validate(manifest, kube, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return {"wrong": "unknown kind"}
    except kubernetes_validate.ValidationError as error:
        return {"wrong": f"{'.'.join(map(str, error.path))}: {error.message}"[:500]}
    return {"wrong": None}


def main() -> None:
    """Answer all questions."""
    verbs: dict[str, Callable[..., dict[str, Any]]] = {"render": render, "lint": lint, "check": check}
    answers = []
    for question in json.load(sys.stdin):
        [(verb, given)] = question.items()
        answers.append(verbs[verb](**given))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
