"""The kernels become machine code for NVIDIA GPUs, here, without one.

What only a compiler finds: names it does not know, types that change in a loop, shapes that do not fit. And what decides
the speed: 16-byte loads that need no register, tensor cores, TMA, nothing spilled.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU kernels need triton")

from tests.kernels.gpu.ahead_of_time import Compiled
from tests.kernels.gpu.compile_all import CASES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ATTENTION = ["_decode_kernel", "_merge_kernel", "_chunk_kernel", "_zero_padding_kernel"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Compiled]]:
    """All cases, by one process (compile_all.py)."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_all"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    return {name: [Compiled(**launch) for launch in launches] for name, launches in told.items()}


def launches_of(compiled: dict[str, list[Compiled]], kind: str) -> Iterator[tuple[int, Compiled]]:
    """With their architecture."""
    found = [(CASES[name][0], launch) for name, launches in compiled.items() for launch in launches if kind in name]
    assert found
    yield from found


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_spilled_and_all_fits(case: str, compiled: dict[str, list[Compiled]]) -> None:
    architecture = CASES[case][0]
    assert compiled[case]
    for launch in compiled[case]:
        told = f"{launch.name}: {launch.registers} registers"
        assert launch.stack_bytes == 0, f"{told}, spills {launch.stack_bytes} bytes a thread"
        assert launch.shared_bytes <= (227 if architecture == 90 else 163) << 10, f"{told}, {launch.shared_bytes} bytes"


def test_attention(compiled: dict[str, list[Compiled]]) -> None:
    for name, launches in compiled.items():
        assert not name.startswith("attention") or [launch.name for launch in launches] == ATTENTION
    for architecture, launch in launches_of(compiled, "attention"):
        if launch.name == "_decode_kernel":
            assert "mma.sync" in launch.ptx, "no tensor cores"
            assert "cp.async.cg.shared.global" in launch.ptx, "K and V are not loaded by 16-byte asynchronous copies"
        if launch.name == "_chunk_kernel":
            assert ("wgmma" in launch.ptx) == (architecture == 90), "warp-group products where Hopper has them"


def test_ffn(compiled: dict[str, list[Compiled]]) -> None:
    """With tensor descriptors, tiles come by TMA into shared memory, from which warp-group products read both factors."""
    names = set()
    for _, launch in launches_of(compiled, "ffn"):
        names.add(launch.name)
        if launch.name in ("gate_up_kernel", "product_kernel"):
            assert "mma" in launch.ptx, f"{launch.name} uses no tensor cores"
            assert "cp.async" in launch.ptx, f"{launch.name} loads nothing by asynchronous copies"
        if "tma" in launch.name:
            for word in ("wgmma", "cp.async.bulk.tensor", "mbarrier"):
                assert word in launch.ptx, f"{launch.name} has no {word}"
    tma = {"gate_up_tma_kernel", "down_tma_kernel"}
    assert names == {"gate_up_kernel", "product_kernel", "add_parts_kernel", *tma}


def test_small_ones(compiled: dict[str, list[Compiled]]) -> None:
    names = {launch.name: launch for _, launch in launches_of(compiled, "small")}
    assert names.keys() == {"_rope_and_write_kernel", "norm_kernel", "block_top_kernel", "merge_kernel"}
    assert "st.global.v4" in names["_rope_and_write_kernel"].ptx, "no 16-byte stores"
