"""Limits of control groups, read from trees as the kernel shows them: v2 and v1, in a container and beside one."""

from pathlib import Path

import pytest

from sortserve.engine import container

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712


def plant(root: Path, files: dict[str, str], named: str) -> tuple[Path, Path]:
    """(where groups are mounted, the file that names the process' own)."""
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (root / "self").write_text(named)
    return root / "cgroup", root / "self"


@pytest.mark.parametrize(
    ("files", "named", "free", "cpus"),
    [
        pytest.param(
            {
                "memory.max": str(4 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 5",
                "cpu.max": "150000 100000",
            },
            "0::/\n",
            3 * GIB,
            1.5,
            id="v2 in a container: unused cached files are free",
        ),
        pytest.param(
            {
                "memory/memory.limit_in_bytes": str(GIB),
                "memory/memory.usage_in_bytes": str(GIB // 2),
                "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}",
                "cpu/cpu.cfs_quota_us": "400000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            "9:cpu,cpuacct:/kubepods/pod1/abc\n7:memory:/kubepods/pod1/abc\n0::/\n",
            GIB * 3 // 4,
            4.0,
            id="v1 in a container: the name is the machine's, the root its own group",
        ),
        pytest.param(
            {
                "a.slice/memory.max": str(2 * GIB),
                "a.slice/memory.current": str(GIB),
                "a.slice/cpu.max": "100000 100000",
                "a.slice/b.scope/memory.max": "max",
                "a.slice/b.scope/memory.current": str(GIB // 2),
                "a.slice/b.scope/cpu.max": "max 100000",
                "other/memory.max": "1",
            },
            "0::/a.slice/b.scope\n",
            GIB,
            1.0,
            id="v2 on a machine: the group above is the limit",
        ),
        pytest.param(
            {
                "memory/memory.limit_in_bytes": str(NO_LIMIT_V1),
                "memory/memory.usage_in_bytes": "0",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            "2:memory:/\n1:cpu:/\n",
            NO_LIMIT_V1,
            None,
            id="v1 without limits",
        ),
        pytest.param(
            {"memory.max": "100", "memory.current": "120", "cpu.max": "max 100000"},
            "0::/\n",
            0,
            None,
            id="more is taken than may be",
        ),
        pytest.param({}, "", None, None, id="no groups"),
    ],
)
def test_limits(tmp_path: Path, files: dict[str, str], named: str, free: int | None, cpus: float | None) -> None:
    mounted, name = plant(tmp_path, files, named)
    assert container.free_bytes(mounted, name) == free
    assert container.cpus(mounted, name) == cpus


def test_a_name_that_leads_out_of_the_tree_is_its_root(tmp_path: Path) -> None:
    """Seen from a namespace below, groups above are named with dots."""
    mounted, name = plant(tmp_path, {"memory.max": "7", "../memory.max": "3"}, "0::/../..\n")
    assert container.free_bytes(mounted, name) == 7


def test_no_system_no_limits(tmp_path: Path) -> None:
    assert container.free_bytes(tmp_path / "none", tmp_path / "none") is None
    assert container.cpus(tmp_path / "none", tmp_path / "none") is None
