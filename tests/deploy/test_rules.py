"""The alerts, as Prometheus' own tool reads and tests them; and what the chart makes of them."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bundled import FULL as BUNDLED_FULL
from tests.deploy.conftest import Ask, documents, only, rendering
from tests.deploy.tools import CHART, HERE, ROOT, run, system_tool

RULES = CHART / "files" / "rules.yaml"
TESTS = HERE / "rules_test.yaml"
FULL = {"prometheusRule": {"enabled": True}}


def alerts_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The alerts of some groups, in order."""
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_rules_check() -> None:
    told = run(system_tool("promtool", "prometheus"), "check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert "SUCCESS" in told


def test_rules_pass_their_unit_tests() -> None:
    run(system_tool("promtool", "prometheus"), "test", "rules", str(TESTS))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('outcome!="met"', 'outcome="refused"'),
        ("> 14.4 *", "> 30 *"),
        ('le="-0.25"', 'le="1.0"'),
        ("[10m]) > 0.9", "[10m]) > 0.99"),
        ("ratio_rate30m > 0.5", "ratio_rate30m > 0.8"),
        ("avg_over_time(sortserve_step_time_error", "max_over_time(sortserve_step_time_error"),
        ("and on (namespace, instance, pod)", "or on (namespace, instance, pod)"),
        ("sortserve_model_ready == 0", "sortserve_model_ready == 1"),
        ("|engine_failed", "|engine_failed|draining"),
        ("[30m]) > 3", "[30m]) > 300"),
    ],
)
def test_the_unit_tests_can_fail(tmp_path: Path, right: str, wrong: str) -> None:
    """One thing changed in the rules, and promtool says no."""
    text = RULES.read_text()
    assert right in text
    (tmp_path / "rules.yaml").write_text(text.replace(right, wrong))
    (tmp_path / "test.yaml").write_text(TESTS.read_text().replace("../../deploy/helm/sortserve/files/", ""))
    command = [system_tool("promtool", "prometheus"), "test", "rules", "test.yaml"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode != 0


def test_each_alert_is_tested_and_has_a_runbook() -> None:
    names = [alert["alert"] for alert in alerts_of(yaml.safe_load(RULES.read_text())["groups"])]
    tested = {
        case["alertname"]
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert tested == set(names)
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    assert [name for name in names if f"\n### {name}\n" not in guide] == []


def test_the_chart_sets_objective_and_full_model(ask: Ask, tmp_path: Path) -> None:
    """Besides those two, and labels and links, the PrometheusRule is the file."""
    own = {
        **FULL,
        "model": {"fullSubmodel": "d24"},
        "prometheusRule": {
            "enabled": True,
            "objective": 0.99,
            "alertLabels": {"team": "a"},
            "runbookUrl": "https://wiki.example/page",
            "disabledAlerts": ["SortServeAbsent"],
        },
    }
    plain, changed, refused = ask(
        [
            rendering(FULL),
            rendering(own),
            rendering({"prometheusRule": {"enabled": True, "disabledAlerts": ["SortServeX"]}}),
        ]
    )
    assert only(plain, "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())
    groups = only(changed, "PrometheusRule")["spec"]["groups"]
    text = yaml.safe_dump({"groups": groups})
    expressions = [rule["expr"] for group in groups for rule in group["rules"]]
    assert "vector(0.99)" in expressions
    assert any('submodel!="d24"' in expression for expression in expressions)
    assert not any(BUNDLED_FULL in expression for expression in expressions)
    alerts = alerts_of(groups)
    assert "SortServeAbsent" not in [alert["alert"] for alert in alerts]
    assert all(alert["labels"]["team"] == "a" for alert in alerts)
    assert alerts[0]["annotations"]["runbook_url"] == f"https://wiki.example/page#{alerts[0]['alert'].lower()}"
    assert "there are: SortServeBudgetBurnFast" in refused["refused"]
    (tmp_path / "rules.yaml").write_text(text)
    run(system_tool("promtool", "prometheus"), "check", "rules", str(tmp_path / "rules.yaml"))


def test_dashboard_is_in_its_configmap(ask: Ask) -> None:
    [answer] = ask([rendering({"dashboard": {"enabled": True}})])
    [made] = [one for one in documents(answer) if one["metadata"]["name"].endswith("-dashboard")]
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    [(name, text)] = made["data"].items()
    assert name.endswith(".json")
    assert text.strip() == (CHART / "files" / "dashboard.json").read_text().strip()
