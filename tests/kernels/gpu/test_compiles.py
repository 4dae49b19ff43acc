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
import json, torch
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

with compiled(90) as results:
    attend(32, 8, 128)
    attend(14, 2, 64, torch.float8_e4m3fn, window=512, softcap=30.0, key_scale=0.5, value_scale=2.0)
    table = zeros(64, 64, dtype=torch.float32)
    rope_and_write(zeros(4, 48 * 128), table, table, zeros(4, dtype=torch.int32), zeros(4, dtype=torch.int64),
                   zeros(32, 16, 1024), num_heads=32, num_kv_heads=8, page_layers=4, layer_in_page=1,
                   query_norm=zeros(128), key_norm=zeros(128))
print(json.dumps([[r.name, r.shared_bytes, r.registers, r.stack_bytes, "wgmma" in r.ptx, "mma.sync" in r.ptx,
                   "cp.async.cg.shared.global" in r.ptx, "st.global.v4" in r.ptx] for r in results]))
"""
ROOT = Path(__file__).resolve().parents[3]


def test_for_hopper(tmp_path: Path) -> None:

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert told.returncode == 0, told.stderr
    results: list[list[Any]] = json.loads(told.stdout.splitlines()[-1])
    names = ["_decode_kernel", "_merge_kernel", "_chunk_kernel", "_zero_padding_kernel"]
    assert [result[0] for result in results] == [*names, *names, "_rope_and_write_kernel"]
    for name, shared, registers, stack, warp_group, warp, copies, stores in results:
        assert stack == 0, f"{name} spills {stack} bytes a thread"
        assert shared <= 227 << 10, name
        assert registers <= 255, name
        if name == "_decode_kernel":
            assert warp, "no tensor cores"
            assert copies, "K and V are not loaded by 16-byte asynchronous copies"
        if name == "_chunk_kernel":
            assert warp_group, "no warp-group products"
        if name == "_rope_and_write_kernel":
            assert stores, "no 16-byte stores"
