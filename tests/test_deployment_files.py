"""What containers and charts say about the server, held to the server: flags, metrics, paths, pins.

These need no tool of a deployment, so they run with every change of the code; `make test-deploy` has the rest.
"""

import argparse
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sortserve.kernels import compiling
from sortserve.kernels.compiling import UnavailableError
from sortserve.server.cli import make_parser
from sortserve.server.metrics import Metrics
from tests.deploy.dockerfile import read_stages
from tests.deploy.expressions import VARIABLES, family, of_dashboard, of_rules, series

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "helm" / "sortserve"
DOCKER = ROOT / "docker"
RULE_TESTS = ROOT / "tests" / "deploy" / "rules_test.yaml"


def serve_flags() -> dict[str, argparse.Action]:
    """The flags of `sortserve serve`."""
    [commands] = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return {flag: action for action in commands.choices["serve"]._actions for flag in action.option_strings}


def test_the_chart_gives_only_flags_that_the_server_has() -> None:
    given = set(re.findall(r"^- (--[a-z-]+)", (CHART / "templates" / "_pod.tpl").read_text(), re.M))
    assert len(given) > 15
    assert given - set(serve_flags()) == set()


def test_choices_of_the_chart_are_the_servers() -> None:
    flags, schema = serve_flags(), json.loads((CHART / "values.schema.json").read_text())
    server = schema["properties"]["server"]["properties"]
    for name, flag in (
        ("dtype", "--dtype"),
        ("policy", "--policy"),
        ("logLevel", "--log-level"),
        ("logFormat", "--log-format"),
    ):
        assert set(server[name]["enum"]) <= set(flags[flag].choices or ()), name
    assert set(server["metricsCompat"]["enum"]) - {""} == set(flags["--metrics-compat"].choices or ())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for name, flag in (
        ("maxBatchTokens", "--max-batch-tokens"),
        ("maxQueue", "--max-queue"),
        ("engineTimeout", "--engine-timeout"),
    ):
        assert values["server"][name] == flags[flag].default, name
    assert values["drain"]["shutdownSeconds"] == flags["--shutdown-timeout"].default


def test_values_and_schema_name_the_same_keys() -> None:
    def keys(schema: dict[str, Any]) -> dict[str, Any] | None:
        return {key: keys(below) for key, below in schema["properties"].items()} if "properties" in schema else None

    def same(values: Any, known: dict[str, Any] | None, path: str) -> None:
        if known is not None and path != "resources":
            assert set(values) == set(known) - {"global"}, path
            for key, below in known.items():
                same(values.get(key), below, f"{path}.{key}".lstrip("."))

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    same(values, keys(schema), "")


def test_every_value_is_used_by_a_template() -> None:
    """A value that does nothing is worse than none: whoever sets it believes something."""

    def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = []
        for key, value in values.items():
            found += leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]
        return found

    templates = "\n".join(path.read_text() for path in sorted((CHART / "templates").rglob("*.*")))
    whole = {"podSecurityContext", "securityContext", "resources", "dashboard.labels"}
    for path in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        if not any(".".join(path).startswith(name) for name in whole):
            assert re.search(rf"\.{path[-1]}\b", templates), path


def test_the_full_model_is_the_bundled_ones() -> None:
    """Share of tokens below the full model: rules and chart name it, and must follow when another model is bundled."""
    layers = json.loads((ROOT / "src" / "sortserve" / "bundled" / "config.json").read_text())["num_hidden_layers"]
    helpers = (CHART / "templates" / "_helpers.tpl").read_text()
    assert f'"sortserve.bundledFullSubmodel" -}}}}\nd{layers}\n' in helpers
    named = {name for rule in of_rules().values() for name in re.findall(r'submodel!="(\w+)"', rule)}
    assert named == {f"d{layers}"} == {VARIABLES["$full"]}
    assert set(re.findall(r'submodel="(d\d+)"', RULE_TESTS.read_text())) >= named


def served_families() -> set[str]:
    """Every metric that the server exposes, sampled yet or not."""
    content, _ = Metrics().render("")
    return {family(name) for name in re.findall(r"^# TYPE (\S+)", content.decode(), re.M)}


def test_dashboard_and_rules_name_only_metrics_that_there_are() -> None:
    expressions = [one for panel in of_dashboard().values() for one in panel] + [*of_rules().values()]
    named = {family(name) for expression in expressions for name, _ in series(expression)}
    assert len(named) > 15
    assert named - served_families() == set()


def test_every_metric_of_the_server_is_shown() -> None:
    """A metric that no panel and no rule reads is one that nobody will look at when it matters."""
    expressions = [one for panel in of_dashboard().values() for one in panel] + [*of_rules().values()]
    named = {family(name) for expression in expressions for name, _ in series(expression)}
    assert served_families() - named <= {"sortserve_budget_seconds"}


def test_dashboard_is_whole() -> None:
    """Ids are unique, panels do not overlap, each says what it shows, and every variable in use is declared."""
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"], panel["title"]
    declared = {f"${variable['name']}" for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)\w+|\$\{(?:\w+)\}", json.dumps([panel.get("targets") for panel in panels])))
    assert {name.replace("{", "").replace("}", "") for name in used} <= declared
    assert declared >= {name for name in VARIABLES if "__" not in name}


def test_images_are_pinned_and_unprivileged() -> None:
    stages = read_stages((DOCKER / "Dockerfile").read_text())
    assert {stage.base for stage in stages.values() if stage.base not in stages} == {stages["base"].base}
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim@sha256:[0-9a-f]{64}", stages["base"].base)
    assert [*stages][-1] == "cpu"  # what a build without --target makes
    for name in ("cpu", "cuda"):
        users = [one.text for one in stages[name].instructions if one.name == "USER"]
        assert users == ["10001:10001"], name
        assert stages[name].base == "runtime"
    environment = " ".join(one.text for one in stages["runtime"].instructions if one.name == "ENV")
    assert "PYTHONSAFEPATH=1" in environment
    installs = [
        one.text
        for stage in stages.values()
        for one in stage.instructions
        if "pip" in one.text and "install " in one.text
    ]
    assert all("-c constraints.txt" in line for line in installs if "apt-get" not in line)
    for name in ("base", "runtime", "cpu"):
        text = " ".join(one.text for one in stages[name].instructions if one.name == "RUN")
        assert not re.search(r"\b(gcc|g\+\+|clang|build-essential|python3\.11-venv|-dev)\b", text), name


def test_the_cpu_image_brings_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as the image compiles them, put in place as its entry point does, and found by the server, with no compiler,
    on both kinds of processor. A small source stands in for the kernels; the libraries' names are the server's."""
    path = DOCKER / "compile_kernels.py"
    spec = importlib.util.spec_from_file_location("compile_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "build"))
    try:
        script.compile_all(tmp_path)
    except UnavailableError as error:
        pytest.skip(str(error))
    made = tmp_path / "build" / "sortserve" / "kernels"
    (tmp_path / "sortserve").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "sortserve").chmod(0o755)
    entry = tmp_path / "entrypoint.sh"
    entry.write_text((DOCKER / "entrypoint.sh").read_text().replace("/opt/kernels", str(made)))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):  # a volume that is empty, and one that is not
        told = subprocess.run(["sh", entry, "serve", "it"], env=environment, capture_output=True, text=True, check=True)
        assert (told.stdout, told.stderr) == ("serve it\n", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    needed, optional = [*compiling.NEEDED.values()], [*compiling.OPTIONAL.values()]
    for flags in (needed, needed + optional):
        monkeypatch.setattr(compiling, "_processor_flags", lambda flags=flags: flags)
        assert compiling.library(source).answer() == 42
    assert len([*(tmp_path / "cache/sortserve/kernels").iterdir()]) == 2


def test_the_gpus_image_has_what_triton_compiles_launchers_with() -> None:
    [command] = [
        one.text for one in read_stages((DOCKER / "Dockerfile").read_text())["cuda"].instructions if one.name == "RUN"
    ]
    assert "gcc libc6-dev libpython3.11-dev" in command


def test_the_cpu_image_takes_them_from_the_stage_that_has_a_compiler() -> None:
    stages = read_stages((DOCKER / "Dockerfile").read_text())
    [copied] = [one.text for one in stages["cpu"].instructions if "--from=build-kernels" in one.text]
    assert copied.split()[1:] == ["/build/cache/sortserve/kernels", "/opt/kernels"]
    commands = [one.text for one in stages["build-kernels"].instructions if one.name == "RUN"]
    assert "install -y --no-install-recommends g++" in commands[0]
    assert "XDG_CACHE_HOME=/build/cache" in commands[1]
    assert stages["build-kernels"].base == "build-cpu"
    entry = DOCKER / "entrypoint.sh"
    assert entry.stat().st_mode & 0o111 == 0o111
    assert [one.words() for one in stages["runtime"].instructions if one.name == "ENTRYPOINT"] == [
        ["/opt/entrypoint.sh"]
    ]
    included = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"!docker/compile_kernels.py", "!docker/entrypoint.sh"} <= set(included)


def test_an_instruction_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="ADD is not known here"):
        read_stages("FROM a AS b\nADD x y\n")


def test_compose_is_as_strict_as_the_chart() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    server = services["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", service["image"]), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DOCKER / source).exists(), volume
