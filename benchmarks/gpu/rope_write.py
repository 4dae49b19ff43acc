"""QK-norm + RoPE + K/V page write: Q, K and V are read once and written once; compared with the same in PyTorch calls."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.rope_write import rope_and_write
from sortserve.kernels.rope import rotate

PAGE_LAYERS, SIZE = 4, 16


def run(device: torch.device) -> list[Result]:
    """Decode and prompt sizes of an 8B model (32 heads on 8 of 128), with and without QK-norm."""
    heads, kv_heads, head_dim = (4, 2, 32) if small(device) else (32, 8, 128)
    rows_list = (2,) if small(device) else (1, 8, 32, 64, 256, 2048)
    results = [_measure(device, rows, heads, kv_heads, head_dim, norm) for rows in rows_list for norm in (False, True)]
    return [*results, _measure(device, rows_list[-1], heads, kv_heads, head_dim, False, fp8=True)]


def _measure(
    device: torch.device, rows: int, heads: int, kv_heads: int, head_dim: int, norm: bool, *, fp8: bool = False
) -> Result:
    dtype, width = model_dtype(device), kv_heads * head_dim
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    angles = torch.rand(4096, head_dim // 2, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(rows, device=device, dtype=torch.int32)
    pages = -(-rows // SIZE)
    pool = torch.zeros(pages * 2 * PAGE_LAYERS, SIZE, width, device=device, dtype=torch.float8_e4m3fn if fp8 else dtype)
    slots = positions.long() // SIZE * (2 * PAGE_LAYERS * SIZE) + positions.long() % SIZE
    weight = torch.ones(head_dim, device=device, dtype=dtype) if norm else None
    out = torch.empty(rows, heads, head_dim, device=device, dtype=dtype)

    def ours() -> Tensor:
        return rope_and_write(
            qkv,
            cos,
            sin,
            positions,
            slots,
            pool,
            num_heads=heads,
            num_kv_heads=kv_heads,
            page_layers=PAGE_LAYERS,
            layer_in_page=1,
            query_norm=weight,
            key_norm=weight,
            out=out,
        )

    moved = 2 * qkv.nbytes + rows * (2 * head_dim * 2 + 12)  # cosines and sines, a position and a slot
    moved -= 2 * rows * width * (dtype.itemsize - pool.itemsize)
    name = "rope_write, QK-norm" if norm else "rope_write, fp8 K/V" if fp8 else "rope_write"
    rotations = torch.complex(cos, sin)
    in_torch = None if fp8 else _in_torch(qkv, rotations, positions, slots, pool, heads, kv_heads, weight)
    return result(
        name,
        f"{rows} rows, {heads} on {kv_heads} x {head_dim}",
        ours,
        device,
        num_bytes=moved,
        flops=0,
        compared={} if in_torch is None else {"torch": in_torch},
    )


def _in_torch(
    qkv: Tensor,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    heads: int,
    kv_heads: int,
    weight: Tensor | None,
) -> Callable[[], Tensor]:
    """The same from PyTorch's own kernels, as the CPU path does it."""
    rows, head_dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    both_slots = torch.stack([slots + SIZE, slots + (PAGE_LAYERS + 1) * SIZE], dim=1).view(-1)
    chosen = rotations[positions.long()][:, None]

    def run_torch() -> Tensor:
        split = qkv.view(rows, heads + 2 * kv_heads, head_dim)
        rotated, value = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
        if weight is not None:
            rotated = F.rms_norm(rotated, (head_dim,), weight, 1e-6)
        rotated = rotate(rotated, chosen)
        both = torch.stack([rotated[:, heads:], value], dim=1)
        pool.view(-1, kv_heads * head_dim).index_copy_(0, both_slots, both.view(-1, kv_heads * head_dim))
        return rotated[:, :heads]

    return run_torch
