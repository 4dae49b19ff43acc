"""The one command for GPU machines, where there is no GPU: every section runs, tiny, and writes its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_without_a_gpu_it_says_so() -> None:
    done = command()
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


@pytest.mark.slow
def test_a_dry_run_runs_every_section(tmp_path: Path) -> None:
    done = command("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert content["failures"] == {}
    assert {check["passed"] for check in content["checks"]} == {True}
    assert any(check["must_fail"] for check in content["checks"])
    assert {row["section"] for row in content["steps"]} == {
        "start",
        "decode",
        "depth",
        "width",
        "mixed",
        "switch",
        "refill",
        "overhead",
        "fp8 K/V",
    }
    names = {kernel["name"] for kernel in content["kernels"]}
    assert names >= {
        "ffn",
        "decode, fp8 K/V",
        "decode, window 16",
        "refill over a prefix, fp8 K/V",
        "rope_write, fp8 K/V",
    }
    assert any("ours without TMA" in kernel["compared"] for kernel in content["kernels"])
    assert "| decode: tiny" in (tmp_path / "gpu-dry-run.md").read_text()
