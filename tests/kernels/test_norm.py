"""RMSNorm against the float64 formula: both of its ways, few rows (mirrored LayerNorm) and many."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sortserve.kernels.norm import FEW_ROWS, RmsNorm, reference
from tests.kernels.closeness import DTYPES, Seeded, tolerance, worst_row_error

ROWS = [pytest.param(rows, id=f"rows{rows}") for rows in (1, 7, FEW_ROWS, FEW_ROWS + 1, 33, 129)]
EPS = 1e-5
# of x: at 0.003 eps is as large as the mean square, at 1000 it is nothing
SCALES = [pytest.param(scale, id=f"x{scale:g}") for scale in (0.003, 1.0, 1000.0)]


def allowed(dtype: torch.dtype, size: int) -> float:
    """The normed value and its product with the weight may round one after the other."""
    return tolerance(dtype, roundings=2, terms=size)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [pytest.param(size, id=f"size{size}") for size in (8, 129, 896)])
@pytest.mark.parametrize("rows", ROWS)
def test_norm(rows: int, size: int, dtype: torch.dtype, scale: float) -> None:
    seeded = Seeded(rows * 1000 + size)
    x = seeded.normal(rows, size, scale=scale, dtype=dtype)
    weight = (1 + seeded.normal(size, scale=0.3)).to(dtype)
    out = RmsNorm(weight, EPS)(x)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert worst_row_error(out, reference(x, weight, EPS)) <= allowed(dtype, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [pytest.param(rows, id=f"rows{rows}") for rows in (1, 2, 33)])
def test_norm_of_heads(rows: int, dtype: torch.dtype) -> None:
    """[rows, heads, head_dim], a view into a wider tensor, as Qwen3 norms queries and keys."""
    seeded = Seeded(rows)
    qkv, weight = seeded.normal(rows, 7, 10, dtype=dtype), seeded.normal(10, dtype=dtype)
    heads = qkv[:, 2:6]
    out, expected = RmsNorm(weight, EPS)(heads), reference(heads, weight, EPS)
    assert worst_row_error(out.flatten(0, 1), expected.flatten(0, 1)) <= allowed(dtype, 10)


def no_eps(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight, 0.0)


def no_weight(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, torch.ones_like(weight), EPS)


def short_mean(x: Tensor, weight: Tensor) -> Tensor:
    """The mean over one element fewer than there are."""
    wide = x.double()
    return wide / (wide[:, :-1].square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def centred(x: Tensor, weight: Tensor) -> Tensor:
    """A LayerNorm without the mirror."""
    return reference(x.double() - x.double().mean(-1, keepdim=True), weight, EPS)


@pytest.mark.parametrize("bug", [no_eps, no_weight, short_mean, centred], ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_finds(dtype: torch.dtype, bug: Callable[[Tensor, Tensor], Tensor]) -> None:
    """At a size where one element, or a mean, still counts for something in bfloat16."""
    seeded = Seeded(5)
    x = seeded.normal(129, 48, scale=0.003, dtype=dtype)
    weight = (1 + seeded.normal(48, scale=0.3)).to(dtype)
    assert worst_row_error(bug(x, weight), reference(x, weight, EPS)) > 2 * allowed(dtype, 48)
