"""Weight-only int8 and fp8 products: half the bytes of bfloat16, which torch.matmul on the same matrix reads."""

import torch
from torch import Tensor

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.linear import linear

HIDDEN, QKV, VOCAB = 4096, 6144, 128256


def run(device: torch.device) -> list[Result]:
    """An 8B model's QKV product and LM head, in the formats that the card knows."""
    kinds = {"int8": torch.int8}
    if small(device) or torch.cuda.get_device_capability(device) >= (8, 9):
        kinds["fp8"] = torch.float8_e4m3fn
    shapes = ((64, 48),) if small(device) else ((HIDDEN, QKV), (HIDDEN, VOCAB))
    rows_list = (2,) if small(device) else (1, 8, 32, 64, 256)
    results = []
    for size, channels in shapes:
        plain = torch.randn(channels, size, device=device, dtype=model_dtype(device))
        scale = plain.float().abs().amax(1) / 100
        for kind, dtype in kinds.items():
            values = (plain / scale[:, None]).round().to(dtype)
            results += [_measure(device, kind, rows, values, scale, plain) for rows in rows_list]
    return results


def _measure(device: torch.device, kind: str, rows: int, values: Tensor, scale: Tensor, plain: Tensor) -> Result:
    channels, size = values.shape
    x = torch.randn(rows, size, device=device, dtype=plain.dtype)
    out = torch.empty(rows, channels, device=device, dtype=plain.dtype)
    return result(
        f"linear {kind}",
        f"{rows} rows, {size} to {channels}",
        lambda: linear(x, values, scale=scale, out=out),
        device,
        num_bytes=values.nbytes + scale.nbytes + x.nbytes + out.nbytes,
        flops=2 * rows * size * channels,
        compared={"torch.matmul": lambda: torch.matmul(x, plain.T)},
    )
