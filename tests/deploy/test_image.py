"""The CPU image, built in a clean root by its Dockerfile's own lines, and run as the chart's pod runs it.

Unprivileged, without capabilities, on a read-only root with the pod's volumes, as process 1. Needs root's rights.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.clean_root import Image, build, tree_bytes
from tests.deploy.conftest import only
from tests.deploy.ports import free_port
from tests.deploy.prove import FOLDER, ask, build_args, serve_once
from tests.deploy.run_root import (
    Start,
    run_once,
    running,
    start_of_image,
    start_of_pod,
    stop,
    writable_places,
)
from tests.deploy.tools import python_tool, run, system_tool
from tests.server.real_server import children

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and changes roots: needs root"),
]
SITE = "opt/sortserve/lib/python3.11/site-packages"
MOST_BYTES = 1200 * 2**20  # 990 MiB when this was written; something large that comes along by itself is to be seen


@pytest.fixture(scope="module")
def image() -> Image:
    """Built if what it is built from has changed; running it changes nothing in it."""
    system_tool("debootstrap", "debootstrap debian-archive-keyring")
    return build("cpu", FOLDER / "stages", FOLDER / "debian", build_args([]))


@pytest.fixture(scope="module")
def pod_start(image: Image, rendered: dict[tuple[str, str], dict[str, Any]]) -> Start:
    """What the kubelet would start for the chart without values."""
    return start_of_pod(image, only(rendered["default", "1.37"], "Deployment")["spec"]["template"]["spec"])


def test_dockerfile_lints() -> None:
    run(python_tool("hadolint"), "--failure-threshold=style", str(Path(__file__).parents[2] / "docker" / "Dockerfile"))


def test_it_serves_as_the_chart_starts_it(image: Image, pod_start: Start, tmp_path: Path) -> None:
    told = serve_once(image, pod_start, tmp_path / "log")
    print(told)
    assert told["tokens"] == 16
    assert pod_start.user == 10001
    assert "--kv-memory=512MiB" in pod_start.command


def test_it_serves_as_docker_starts_it(image: Image, tmp_path: Path) -> None:
    assert serve_once(image, start_of_image(image), tmp_path / "log")["tokens"] == 16


def test_it_is_unprivileged_and_writes_only_to_volumes(image: Image, pod_start: Start, tmp_path: Path) -> None:
    with running(image, pod_start, free_port(), tmp_path / "log") as server:
        ask(server)
        pids = [server.inner_pid(), *children(server.inner_pid())]
        assert len(pids) == 2
        for pid in pids:
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
            )
            assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
            assert status["NoNewPrivs"] == "1"
            assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {"0" * 16}
            mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
            writable = {place for _, place, _, options, *_ in mounts if "rw" in options.split(",")}
            assert writable <= {
                *pod_start.volumes,
                "/proc",
                *(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")),
            }
        assert stop(server) == 0
        assert " ERROR " not in server.log
        assert "Read-only" not in server.log


def test_the_read_only_root_is_one(image: Image, pod_start: Start) -> None:
    """That the tests above can fail: writing outside of the volumes does."""
    for place in ("/opt/sortserve", "/etc", "/var/tmp", "/models"):
        assert "Read-only file system" in run_once(image, pod_start, ["touch", f"{place}/x"]).stderr, place
    for place in pod_start.volumes:
        assert run_once(image, pod_start, ["touch", f"{place}/x"]).returncode == 0, place
    without = Start(pod_start.command, pod_start.env, 10001, 10001, ["/dev/shm"], "/")
    refused = run_once(image, without, [*pod_start.command, f"--port={free_port()}"])
    assert refused.returncode == 2
    assert "set TMPDIR to a writable folder" in refused.stderr


def test_nothing_is_left_of_the_build(image: Image) -> None:
    """No compiler, no pip, no setting of this machine's pip; and nothing of ours that the user could change."""
    assert len([*(image.root / "opt/kernels").glob("*.so")]) == 2
    for program in ("gcc", "g++", "cc", "clang", "ld", "make", "pip", "pip3"):
        assert not [
            place
            for place in ("usr/bin", "usr/local/bin", "opt/sortserve/bin")
            if (image.root / place / program).exists()
        ]
    assert not (image.root / SITE / "pip").exists()
    assert not (image.root / "etc/pip.conf").exists()
    assert not (image.root / "etc/xdg/pip").exists()
    assert (image.root / SITE / "sortserve/bundled/model.safetensors").exists()
    places = {place for place in writable_places(image) if not place.startswith("/dev/")}
    assert places <= {"/tmp", "/var/tmp", "/run/lock", "/var/cache/sortserve"}
    size = tree_bytes(image.root)
    print(f"{size / 2**20:.0f} MiB")
    assert size < MOST_BYTES
