"""The plain manifests in deploy/kustomize that are made from the chart: `python -m tests.deploy.manifests` writes them.

The chart stays the one place where a pod is described; a test tells when these files are behind it.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.conftest import documents, rendering
from tests.deploy.tools import HERE, ROOT, python_tool, run

KUSTOMIZE = ROOT / "deploy" / "kustomize"
HEAD = "# Made from the chart by `python -m tests.deploy.manifests`: change that, not this.\n"
_HELMS = ("helm.sh/chart", "app.kubernetes.io/managed-by")
MONITORING: dict[str, Any] = {
    "podMonitor": {"enabled": True},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Texts of several lines as blocks, as a person would write them."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def made() -> dict[Path, str]:
    """Path -> content, of every file that follows from the chart."""
    questions = [rendering({"test": {"enabled": False}, **values}, name="sortserve") for values in ({}, MONITORING)]
    told = json.loads(run(python_tool("python"), str(HERE / "helm_tool.py"), text=json.dumps(questions)))
    base, monitored = (documents(answer) for answer in told)
    more = [document for document in monitored if document not in base]
    return {
        KUSTOMIZE / "base" / "server.yaml": _text(base),
        KUSTOMIZE / "components" / "monitoring" / "monitoring.yaml": _text(more),
    }


def _text(found: list[dict[str, Any]]) -> str:
    for document in found:
        for label in _HELMS:
            document["metadata"]["labels"].pop(label)
    dumped: str = yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)
    return HEAD + dumped


def main() -> None:
    """Write them."""
    for path, text in made().items():
        path.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
