"""The expressions of the dashboard and the rules, and the series and labels that they name."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.bundled import FULL
from tests.deploy.tools import CHART

_SERIES = re.compile(r"(?<![\w:])(sortserve_\w+)(\{[^}]*\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_SUFFIXES = ("_total", "_bucket", "_count", "_sum", "_info", "_created")
VARIABLES = {
    "$__rate_interval": "1m",
    "$__range": "1h",
    "$namespace": ".*",
    "$model": ".*",
    "$instance": ".*",
    "$full": FULL,
}


def of_dashboard() -> dict[str, list[str]]:
    """Panel title -> its expressions, with variables as Grafana would put them."""
    dashboard: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
    found: dict[str, list[str]] = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found.setdefault(panel["title"], []).append(expression)
    return found


def of_rules() -> dict[str, str]:
    """Name of the rule -> its expression."""
    groups = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"]
    return {rule.get("record", rule.get("alert")): rule["expr"] for group in groups for rule in group["rules"]}


def series(expression: str) -> Iterator[tuple[str, list[str]]]:
    """(name, labels that its selector names) of each series of the server in an expression."""
    for name, selector in _SERIES.findall(expression):
        yield name, _LABEL.findall(selector)


def family(name: str) -> str:
    """What a series belongs to: `x_bucket` to `x`, `y_total` to `y`."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
