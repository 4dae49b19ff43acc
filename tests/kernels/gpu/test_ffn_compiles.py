"""The FFN, product, norm and sampling kernels become machine code for GPUs, here, without one: see test_compiles.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the GPU kernels need triton")

PROGRAM = """
import json, sys, torch
from sortserve.kernels.gpu import product as products
from sortserve.kernels.gpu import ffn
from sortserve.kernels.gpu.norm import add_rms_norm, gather_norm, rms_norm
from sortserve.kernels.gpu.sampling import argmax, top_k
from tests.kernels.gpu.ahead_of_time import compiled

card = products.Card(132, 227 << 10)
products.card_of = ffn.card_of = lambda device: card
architecture, rows_list, formats, tma = int(sys.argv[1]), *json.loads(sys.argv[2])
kinds = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)

with compiled(architecture) as results:
    for rows in rows_list:
        for name in formats:
            kind, scales = kinds[name], [None, None, None]
            if name != "bf16":
                scales = [zeros(n, dtype=torch.float32) for n in (1024, 1024, 512)]
            weights = ffn.GatedWeights(*(zeros(*s, dtype=kind) for s in ((1024, 512), (1024, 512), (512, 1024))), *scales)
            ffn.staircase_ffn(zeros(rows, 512), weights, zeros(rows, dtype=torch.int32), zeros(rows, 512),
                              tma=tma)
    rms_norm(zeros(2, 4096), zeros(4096), 1e-5)
    add_rms_norm(zeros(2, 4096), zeros(2, 4096), zeros(4096), 1e-5)
    gather_norm(zeros(2, 4096), zeros(2, dtype=torch.int64), zeros(4096), 1e-5)
    for call in (argmax, lambda logits: top_k(logits, 64)):
        call(zeros(2, 4096, dtype=torch.float32))
print(json.dumps([[r.name, r.shared_bytes, r.stack_bytes, r.registers, "mma" in r.ptx, "cp.async" in r.ptx,
                   "wgmma" in r.ptx and "cp.async.bulk.tensor" in r.ptx and "mbarrier" in r.ptx] for r in results]))
"""
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_for_hopper(tmp_path: Path) -> None:
    _compile(tmp_path, 90, [4], ["bf16", "int8"])


@pytest.mark.slow
def test_tensor_descriptors_for_hopper(tmp_path: Path) -> None:
    """Tiles come by TMA into shared memory, from which the warp-group products read both of their factors. 9,000 rows of 512
    are enough tiles for a down projection that is not split."""
    results = _compile(tmp_path, 90, [9000], ["bf16"], tma=True)
    found = {result[0]: result for result in results}
    for name in ("gate_up_tma_kernel", "down_tma_kernel"):
        assert found[name][6], f"{name} has no TMA loads or no warp-group products"


@pytest.mark.slow
def test_every_row_of_the_table(tmp_path: Path) -> None:
    """On an A100 (80) the widest int8 product spills 16 bytes a thread; on Hopper nothing does."""
    _compile(tmp_path, 90, [64, 300], ["bf16", "fp8"])


def _compile(
    tmp_path: Path, architecture: int, rows: list[int], formats: list[str], *, tma: bool = False
) -> list[list[Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(architecture), json.dumps([rows, formats, tma])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert told.returncode == 0, told.stderr
    results: list[list[Any]] = json.loads(told.stdout.splitlines()[-1])
    names = {result[0] for result in results}
    ffn = {"gate_up_tma_kernel", "down_tma_kernel"} if tma else {"gate_up_kernel", "product_kernel"}
    assert names >= {*ffn, "norm_kernel", "block_top_kernel"}
    for name, shared, stack, registers, products, copies, _ in results:
        assert stack == 0, f"{name} spills {stack} bytes a thread ({registers} registers)"
        assert shared <= (227 if architecture == 90 else 163) << 10, f"{name} takes {shared} bytes of shared memory"
        if name in ("gate_up_kernel", "product_kernel"):
            assert products, f"{name} uses no tensor cores"
            assert copies, f"{name} loads nothing by asynchronous copies"
    return results
