"""The staircase FFN at full, half and mixed width, against torch.matmul for the same FFN in the same run.

Bytes: 3 x hidden x width of the widest row, once; activations of all rows. FLOPs: 6 x hidden x width a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.ffn import GatedWeights, staircase_ffn


def run(device: torch.device) -> list[Result]:
    """Llama-3.1-8B's FFN (4096 to 14336) at decode and prompt sizes, in bfloat16, and in int8 at decode sizes."""
    hidden, width = (32, 96) if small(device) else (4096, 14336)
    rows_list = (2,) if small(device) else (1, 8, 16, 32, 64, 128, 256, 2048)
    weights = _weights(hidden, width, device)
    found = [each for rows in rows_list for each in _measure(rows, weights, device)]
    narrow = _int8(weights)
    return found + [_one("int8, full", rows, [width] * rows, narrow, device, None) for rows in rows_list if rows <= 64]


def _weights(hidden: int, width: int, device: torch.device) -> GatedWeights:
    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(model_dtype(device))

    return GatedWeights(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))


def _int8(weights: GatedWeights) -> GatedWeights:
    made: dict[str, Tensor] = {}
    for name in ("gate", "up", "down"):
        weight = getattr(weights, name).float()
        scale = weight.abs().amax(1) / 127.0
        made |= {name: (weight / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
    return GatedWeights(**made)


def _measure(rows: int, weights: GatedWeights, device: torch.device) -> list[Result]:
    width = weights.gate.shape[0]
    both = torch.cat([weights.gate, weights.up])

    def in_torch(share: int, x: Tensor) -> Tensor:
        half = width // share
        merged = both if share == 1 else both.view(2, width, -1)[:, :half].reshape(2 * half, -1)
        gate, up = F.linear(x, merged).chunk(2, -1)
        return F.linear(F.silu(gate) * up, weights.down[:, :half])

    mixed = [width if row < max(1, rows // 8) else width // 2 for row in range(rows)]
    return [
        _one("full", rows, [width] * rows, weights, device, lambda x: in_torch(1, x)),
        _one("half", rows, [width // 2] * rows, weights, device, None),
        _one("an eighth full, the rest half", rows, mixed, weights, device, None),
    ]


def _one(
    name: str, rows: int, widths: list[int], weights: GatedWeights, device: torch.device, in_torch: object
) -> Result:
    width, hidden = weights.gate.shape
    x = torch.randn(rows, hidden, device=device, dtype=model_dtype(device))
    limits = torch.tensor(widths, dtype=torch.int32, device=device)
    inner, out = x.new_empty(rows, width), torch.empty_like(x)
    compared = {"torch.matmul": lambda: in_torch(x)} if callable(in_torch) else None
    return result(
        f"FFN, {name}",
        f"{rows} rows, {hidden} to {width}",
        lambda: staircase_ffn(x, weights, limits, x, inner=inner, out=out),
        device,
        num_bytes=3 * hidden * max(widths) * weights.gate.element_size() + 3 * x.nbytes,
        flops=6 * hidden * sum(widths),
        compared=compared,
    )
