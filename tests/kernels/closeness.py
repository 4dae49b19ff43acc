"""How far a kernel may be from its float64 reference, derived and not guessed.

A value rounded to a dtype is off by at most the unit roundoff u, relatively. A kernel that rounds `roundings` times on
its way and sums `terms` products in float32 is off by about roundings * u(dtype) + sqrt(terms) * u(float32), row by row
and measured by the norm; the factor 4 on the sum is for orders of summation that are not random.
"""

import math

import pytest
import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
Kind = tuple[torch.dtype, bool]  # of the compiled products: the rows' dtype, and whether weights are int8
KINDS = [
    pytest.param((torch.bfloat16, False), id="bfloat16"),
    pytest.param((torch.bfloat16, True), id="int8-bfloat16"),
    pytest.param((torch.float32, True), id="int8-float32"),
]
ROWS = [pytest.param(rows, id=f"rows{rows}") for rows in (1, 7, 33, 129)]


def tolerance(dtype: torch.dtype, *, roundings: float, terms: int) -> float:
    """Relative error allowed to one row."""
    return roundings * UNIT_ROUNDOFF[dtype] + 4 * math.sqrt(terms) * UNIT_ROUNDOFF[torch.float32]


def worst_row_error(out: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row (all but the first dimension), so that one wrong row is not averaged away."""
    assert out.shape == expected.shape, f"{tuple(out.shape)}, expected {tuple(expected.shape)}"
    assert out.isfinite().all()
    difference = (out.double() - expected).flatten(1).norm(dim=1)
    return float((difference / expected.flatten(1).norm(dim=1).clamp_min(1e-30)).max())


class Seeded:
    """Random tensors from a seed that a failing test shows."""

    def __init__(self, seed: int) -> None:
        print(f"seed {seed}")
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype)

    def ints(self, low: int, high: int, count: int) -> list[int]:
        """`count` numbers in [low, high)."""
        return torch.randint(low, high, (count,), generator=self._generator).tolist()

    def permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()
