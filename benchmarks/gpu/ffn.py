"""The staircase FFN: each width's weights are read once per tile of rows; compared with torch.matmul for the same FFN, and
from 65 rows on with our own kernels without tensor descriptors.

The comparison runs on a prefix of its own at every width, copied before the clock starts: what a model cut to that width
would take. Mixed widths are half full and half at a quarter, rows sorted; they are compared with nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.ffn import FfnScratch, GatedWeights, staircase_ffn
from sortserve.kernels.gpu.ffn_tma import has_tma

ROWS = (1, 8, 32, 64, 128, 256, 2048)
SHARES = (1.0, 0.5, 0.25)


def run(device: torch.device) -> list[Result]:
    """Llama-3.1-8B's FFN (4096 to 14336): uniform full, half and quarter width, and mixed widths."""
    hidden, width = (32, 128) if small(device) else (4096, 14336)
    dtype = model_dtype(device)
    gate, up, down = (
        torch.randn(*shape, device=device, dtype=dtype) * shape[1] ** -0.5
        for shape in ((width, hidden), (width, hidden), (hidden, width))
    )
    weights = GatedWeights(gate, up, down)
    values = {
        name: (weight.float() / 0.01).round().to(torch.int8)
        for name, weight in (("gate", gate), ("up", up), ("down", down))
    }
    scales = {f"{name}_scale": torch.full((len(values[name]),), 0.01, device=device) for name in values}
    narrow = GatedWeights(**values, **scales)
    results = []
    for rows in (2,) if small(device) else ROWS:
        results += [_measure(device, weights, [int(width * share)] * rows, f"width {share:.0%}") for share in SHARES]
        if rows <= 64:
            results.append(_measure(device, narrow, [width] * rows, "int8, width 100%"))
        if rows > 1:
            wide = rows // 2
            results.append(_measure(device, weights, [width] * wide + [width // 4] * (rows - wide), "mixed"))
    if small(device):
        results.append(_measure(device, weights, [width] * 66, "width 100%", tma=True))
    return results


def _measure(
    device: torch.device, weights: GatedWeights, widths: list[int], told: str, tma: bool | None = None
) -> Result:
    hidden, rows, widest = weights.down.shape[0], len(widths), max(widths)
    x = torch.randn(rows, hidden, device=device, dtype=model_dtype(device))
    residual, out = torch.randn_like(x), torch.empty_like(x)
    on_device = torch.tensor(widths, dtype=torch.int32, device=device)
    scratch = FfnScratch.for_rows(rows, weights, x)

    def ours(tma: bool | None = tma) -> Tensor:
        return staircase_ffn(x, weights, on_device, residual, scratch=scratch, out=out, tma=tma)

    moved = 3 * hidden * widest * weights.gate.itemsize + 3 * x.nbytes + 2 * sum(widths) * x.itemsize
    compared: dict[str, Callable[[], object]] = (
        {"torch.matmul": _in_torch(x, residual, weights, widest)}
        if min(widths) == widest and weights.gate_scale is None
        else {}
    )
    if rows > 64 and (tma or has_tma(device)):
        compared["ours without TMA"] = lambda: ours(tma=False)
    shape = f"{rows} rows, {hidden} x {weights.gate.shape[0]}, {told}"
    flops = 6 * hidden * sum(widths)
    return result("ffn", shape, ours, device, num_bytes=moved, flops=flops, compared=compared)


def _in_torch(x: Tensor, residual: Tensor, weights: GatedWeights, width: int) -> Callable[[], object]:
    """Gate and up as one product, as engines with one fixed model have it."""
    gate_up = torch.cat([weights.gate[:width], weights.up[:width]])
    down = weights.down[:, :width].contiguous()

    def run_torch() -> Tensor:
        gate, up = torch.matmul(x, gate_up.T).chunk(2, dim=-1)
        return torch.addmm(residual, F.silu(gate) * up, down.T)

    return run_torch
