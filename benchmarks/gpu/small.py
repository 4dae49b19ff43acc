"""Norms and the most probable tokens: each input is read once, so bytes alone set the ceiling."""

import torch
import torch.nn.functional as F

from benchmarks.gpu.common import Result, model_dtype, result, small
from sortserve.kernels.gpu.norm import add_rms_norm, gather_norm
from sortserve.kernels.gpu.sampling import argmax, top_k

EPS = 1e-5


def run(device: torch.device) -> list[Result]:
    """Sizes of an 8B model: hidden 4096, vocabulary 128256."""
    size, vocab = (64, 2000) if small(device) else (4096, 128256)
    rows_list = (2,) if small(device) else (1, 32, 256, 2048)
    results = []
    for rows in rows_list:
        results += _norms(device, rows, size)
        if rows <= 256:
            results += _tokens(device, rows, vocab)
    return results


def _norms(device: torch.device, rows: int, size: int) -> list[Result]:
    dtype, shape = model_dtype(device), f"{rows} x {size}"
    x, residual = (torch.randn(rows, size, device=device, dtype=dtype) for _ in range(2))
    outs = torch.empty_like(x), torch.empty_like(x)
    weight, index = torch.ones(size, device=device, dtype=dtype), torch.arange(rows, device=device).flip(0)
    return [
        result(
            "add_rms_norm",
            shape,
            lambda: add_rms_norm(x, residual, weight, EPS, out=outs),
            device,
            num_bytes=4 * x.nbytes + weight.nbytes,
            flops=0,
            compared={"torch": lambda: F.rms_norm(x + residual, (size,), weight, EPS)},
        ),
        result(
            "gather_norm",
            shape,
            lambda: gather_norm(x, index, weight, EPS, out=outs[0]),
            device,
            num_bytes=2 * x.nbytes + index.nbytes + weight.nbytes,
            flops=0,
            compared={"torch": lambda: F.rms_norm(x[index], (size,), weight, EPS)},
        ),
    ]


def _tokens(device: torch.device, rows: int, vocab: int) -> list[Result]:
    logits, shape = torch.randn(rows, vocab, device=device, dtype=model_dtype(device)), f"{rows} x {vocab}"
    calls = {
        "argmax": (lambda: argmax(logits), lambda: logits.float().log_softmax(-1).max(-1)),
        "top_k 50": (lambda: top_k(logits, 50), lambda: logits.topk(50)),
    }
    return [
        result(name, shape, ours, device, num_bytes=logits.nbytes, flops=0, compared={"torch": theirs})
        for name, (ours, theirs) in calls.items()
    ]
