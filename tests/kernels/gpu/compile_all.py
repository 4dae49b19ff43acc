"""Compiles every kernel, in the sizes that decide, and prints what became of each (run as a module).

A process of its own, since the interpreter is chosen for good when a kernel is defined; one for all cases, since what they
share (start, norms, merges) then is compiled once.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sortserve.kernels.gpu import ffn, tiling
from sortserve.kernels.gpu.attention import AttentionLayer, PagedRows, paged_attention, rows_per_tile
from sortserve.kernels.gpu.norm import add_rms_norm, gather_norm, rms_norm
from sortserve.kernels.gpu.rope_write import rope_and_write
from sortserve.kernels.gpu.sampling import argmax, top_k
from tests.kernels.gpu.ahead_of_time import compiled

FORMATS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
HARDEST: dict[str, Any] = {"window": 512, "softcap": 30.0}


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def attend(heads: int, kv_heads: int, head_dim: int, kind: str = "bf16", **options: Any) -> None:
    """Decode and chunks of one size of heads."""
    index, tables = zeros(4, dtype=torch.int32), zeros(4, 256, dtype=torch.int32)
    batch = PagedRows(tables, index, index, index, index, 4096, rows_per_tile(heads, kv_heads, head_dim))
    pool = zeros(32, 16, kv_heads * head_dim, dtype=FORMATS[kind])
    paged_attention(zeros(4, heads, head_dim), pool, batch, AttentionLayer(4, 1, kv_heads, **options))


def gated(rows: int, kind: str, *, tma: bool = False) -> None:
    """An FFN of so many rows."""
    scales = [None if kind == "bf16" else zeros(size, dtype=torch.float32) for size in (1024, 1024, 512)]
    sizes = ((1024, 512), (1024, 512), (512, 1024))
    weights = ffn.GatedWeights(*(zeros(*size, dtype=FORMATS[kind]) for size in sizes), *scales)
    ffn.staircase_ffn(zeros(rows, 512), weights, zeros(rows, dtype=torch.int32), zeros(rows, 512), tma=tma)


def small() -> None:
    """Rotation and page write, norms, the best of a vocabulary."""
    table = zeros(64, 64, dtype=torch.float32)
    rope_and_write(
        zeros(4, 48 * 128), table, table, zeros(4, dtype=torch.int32), zeros(4, dtype=torch.int64), zeros(32, 16, 1024),
        num_heads=32, num_kv_heads=8, page_layers=4, layer_in_page=1, query_norm=zeros(128), key_norm=zeros(128),
    )  # fmt: skip
    rms_norm(zeros(2, 4096), zeros(4096), 1e-5)
    add_rms_norm(zeros(2, 4096), zeros(2, 4096), zeros(4096), 1e-5)
    gather_norm(zeros(2, 4096), zeros(2, dtype=torch.int64), zeros(4096), 1e-5)
    argmax(zeros(2, 4096, dtype=torch.float32))
    top_k(zeros(2, 4096, dtype=torch.float32), 64)


# Chunks once spilled 24 bytes a thread at head size 64 with four warps, and 112 at 256 with blocks of 64 tokens: both have
# the hardest of the options here, in both formats of K/V. 9,000 rows of 512 are enough tiles for a down projection that
# is not split.
CASES: dict[str, tuple[int, Callable[[], None]]] = {
    "attention-128": (90, partial(attend, 32, 8, 128)),
    "attention-64-hardest": (90, partial(attend, 14, 2, 64, **HARDEST)),
    "attention-256-hardest": (90, partial(attend, 16, 8, 256, **HARDEST)),
    "attention-64-fp8-hardest": (90, partial(attend, 14, 2, 64, "fp8", **HARDEST)),
    "attention-128-fp8-hardest": (90, partial(attend, 32, 8, 128, "fp8", **HARDEST)),
    "attention-256-fp8-hardest": (90, partial(attend, 16, 8, 256, "fp8", **HARDEST)),
    "attention-64-ampere": (80, partial(attend, 14, 2, 64)),
    "attention-256-ampere": (80, partial(attend, 16, 8, 256)),
    "ffn-4-bf16": (90, partial(gated, 4, "bf16")),
    "ffn-4-int8": (90, partial(gated, 4, "int8")),
    "ffn-64-fp8": (90, partial(gated, 64, "fp8")),
    "ffn-300-bf16": (90, partial(gated, 300, "bf16")),
    "ffn-300-fp8": (90, partial(gated, 300, "fp8")),
    "ffn-9000-tma": (90, partial(gated, 9000, "bf16", tma=True)),
    "small": (90, small),
}


def main() -> None:
    """Results by case, as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "card_of", lambda device: tiling.Card(132, 227 << 10))
        print(json.dumps({name: _launches(*case) for name, case in CASES.items()}))


def _launches(architecture: int, call: Callable[[], None]) -> list[dict[str, Any]]:
    with compiled(architecture) as results:
        call()
    return [asdict(result) for result in results]


if __name__ == "__main__":
    main()
