"""The kernels of attention and rotation become machine code for a Hopper GPU, here, without one.

What only a compiler finds: names it does not know, types that change in a loop, shapes that do not fit. And what decides
the speed: 16-byte loads that need no register, tensor cores, nothing spilled.
"""

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
from sortserve.kernels.gpu.attention import PagedRows, paged_attention, rows_per_tile
from sortserve.kernels.gpu.rope_write import rope_and_write
from tests.kernels.gpu.ahead_of_time import compiled

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)

def attend(heads, kv_heads, head_dim, pool_dtype=torch.bfloat16, **options):
    index = zeros(4, dtype=torch.int32)
    tables = zeros(4, 256, dtype=torch.int32)
    batch = PagedRows(tables, index, index, index, index, 4096, rows_per_tile(heads, kv_heads, head_dim))
    pool = zeros(32, 16, kv_heads * head_dim, dtype=pool_dtype)
    paged_attention(zeros(4, heads, head_dim), pool, batch, page_layers=4, layer_in_page=1, num_kv_heads=kv_heads, **options)

with compiled(int(sys.argv[1])) as results:
    for heads, kv_heads, head_dim, fp8, options in json.loads(sys.argv[2]):
        attend(heads, kv_heads, head_dim, torch.float8_e4m3fn if fp8 else torch.bfloat16, **options)
    table = zeros(64, 64, dtype=torch.float32)
    rope_and_write(zeros(4, 48 * 128), table, table, zeros(4, dtype=torch.int32), zeros(4, dtype=torch.int64),
                   zeros(32, 16, 1024), num_heads=32, num_kv_heads=8, page_layers=4, layer_in_page=1,
                   query_norm=zeros(128), key_norm=zeros(128))
print(json.dumps([[r.name, r.shared_bytes, r.stack_bytes, "wgmma" in r.ptx, "mma.sync" in r.ptx,
                   "cp.async.cg.shared.global" in r.ptx, "st.global.v4" in r.ptx] for r in results]))
"""
ROOT = Path(__file__).resolve().parents[3]


HARDEST = {"window": 512, "softcap": 30.0}
LLAMA_8B: tuple[Any, ...] = (32, 8, 128, False, {})


def test_for_hopper(tmp_path: Path) -> None:
    _compile(tmp_path, 90, [LLAMA_8B])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_row_of_the_tables(tmp_path: Path, architecture: int) -> None:
    """Chunks spilled 24 bytes a thread at head size 64 with four warps, and 112 at 256 with blocks of 64 tokens."""
    sizes = [(4, 2, 32), (14, 2, 64), (32, 8, 128), (16, 8, 256)]
    cases: list[Any] = [(*size, False, {}) for size in sizes]
    if architecture >= 89:
        cases += [(*size, True, HARDEST) for size in sizes]
    _compile(tmp_path, architecture, cases)


def _compile(tmp_path: Path, architecture: int, cases: list[Any]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(architecture), json.dumps(cases)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert told.returncode == 0, told.stderr
    results: list[list[Any]] = json.loads(told.stdout.splitlines()[-1])
    names = ["_decode_kernel", "_merge_kernel", "_chunk_kernel", "_zero_padding_kernel"]
    assert [result[0] for result in results] == [*(names * len(cases)), "_rope_and_write_kernel"]
    for name, shared, stack, warp_group, warp, copies, stores in results:
        assert stack == 0, f"{name} spills {stack} bytes a thread"
        assert shared <= (227 if architecture == 90 else 163) << 10, f"{name} takes {shared} bytes of shared memory"
        if name == "_decode_kernel":
            assert warp, "no tensor cores"
            assert copies, "K and V are not loaded by 16-byte asynchronous copies"
        if name == "_chunk_kernel":
            assert warp_group == (architecture == 90), "warp-group products where Hopper has them"
        if name == "_rope_and_write_kernel":
            assert stores, "no 16-byte stores"
