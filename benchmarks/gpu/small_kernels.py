"""The small fused kernels against the same in PyTorch's own: add + RMSNorm, exit gather + norm, argmax."""

import torch
import torch.nn.functional as F

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.norm import add_rms_norm, gather_norm
from sortserve.kernels.gpu.sampling import argmax

EPS = 1e-5


def run(device: torch.device) -> list[Result]:
    """Hidden size 4096, a vocabulary of 128,256, as Llama-3.1-8B."""
    hidden, vocab = (32, 1100) if small(device) else (4096, 128256)
    rows_list = (2,) if small(device) else (1, 32, 256)
    return [each for rows in rows_list for each in _measure(device, rows, hidden, vocab)]


def _measure(device: torch.device, rows: int, hidden: int, vocab: int) -> list[Result]:
    dtype = model_dtype(device)
    x, residual = (torch.randn(rows, hidden, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(hidden, device=device, dtype=dtype)
    index = torch.randperm(rows, device=device)
    logits = torch.randn(rows, vocab, device=device)

    def norm(states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, (hidden,), weight, EPS)

    def in_torch() -> tuple[torch.Tensor, torch.Tensor]:
        ids = logits.argmax(-1)
        return ids, logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)

    shape = f"{rows} rows of {hidden}"
    return [
        result(
            "add + RMSNorm",
            shape,
            lambda: add_rms_norm(x, residual, weight, EPS),
            device,
            num_bytes=4 * x.nbytes,
            flops=0,
            compared={"torch": lambda: norm(x + residual)},
        ),
        result(
            "exit gather + norm",
            shape,
            lambda: gather_norm(x, index, weight, EPS),
            device,
            num_bytes=2 * x.nbytes,
            flops=0,
            compared={"torch": lambda: norm(x[index])},
        ),
        result(
            "argmax",
            f"{rows} rows of {vocab}",
            lambda: argmax(logits),
            device,
            num_bytes=logits.nbytes,
            flops=0,
            compared={"torch": in_torch},
        ),
    ]
