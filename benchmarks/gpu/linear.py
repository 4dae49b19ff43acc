"""Weight-only products in int8 and fp8 against cuBLAS in bfloat16: what is read is half as much."""

import torch

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.linear import linear


def run(device: torch.device) -> list[Result]:
    """The output projection (4096 to 4096) and the QKV projection (4096 to 6144) of Llama-3.1-8B at decode sizes."""
    shapes = ((32, 48),) if small(device) else ((4096, 4096), (4096, 6144))
    rows_list = (2,) if small(device) else (1, 8, 32, 64)
    formats = [("int8", torch.int8)]
    if small(device) or torch.cuda.get_device_capability(device) >= (8, 9):
        formats.append(("fp8", torch.float8_e4m3fn))
    return [_measure(device, rows, *shape, *kind) for shape in shapes for rows in rows_list for kind in formats]


def _measure(device: torch.device, rows: int, k: int, n: int, name: str, dtype: torch.dtype) -> Result:
    x = torch.randn(rows, k, device=device, dtype=model_dtype(device))
    plain = torch.randn(n, k, device=device, dtype=model_dtype(device))
    narrow = (torch.randn(n, k, device=device) * 20).to(dtype)
    scale = torch.full((n,), 0.01, device=device)
    return result(
        f"linear, {name}",
        f"{rows} rows, {k} to {n}",
        lambda: linear(x, narrow, scale=scale),
        device,
        num_bytes=narrow.nbytes + scale.nbytes + x.nbytes + rows * n * x.element_size(),
        flops=2 * rows * n * k,
        compared={"cuBLAS, bfloat16": lambda: linear(x, plain)},
    )
