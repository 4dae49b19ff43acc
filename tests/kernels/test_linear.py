"""Linear, packed and not, with its fused forms, against the float64 formula."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.kernels.linear import Linear, can_pack, reference
from tests.kernels.closeness import DTYPES, ROWS, Seeded, tolerance, worst_row_error

SIZES = [pytest.param(ins, outs, id=f"{ins}to{outs}") for ins, outs in ((1, 5), (48, 33), (129, 257), (300, 64))]
PACK = [pytest.param(True, id="packed"), pytest.param(False, id="plain")]
BIAS = [pytest.param(True, id="bias"), pytest.param(False, id="nobias")]


def case(
    rows: int, ins: int, outs: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, Seeded]:
    """x [rows, ins], weight [outs, ins] and bias [outs], such that products and bias are of size 1."""
    seeded = Seeded(rows * 1000 + ins)
    x, weight = seeded.normal(rows, ins, dtype=dtype), seeded.normal(outs, ins, scale=ins**-0.5, dtype=dtype)
    return x, weight, seeded.normal(outs, dtype=dtype) if bias else None, seeded


def make(weight: Tensor, bias: Tensor | None, pack: bool) -> Linear:
    if pack and not can_pack(weight):
        pytest.skip(f"oneDNN packs no {weight.dtype} here")
    made = Linear(weight, bias, pack=pack)
    assert made.packed == pack
    return made


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ins", "outs"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(rows: int, ins: int, outs: int, dtype: torch.dtype, pack: bool, bias: bool) -> None:
    """One rounding, of the result."""
    x, weight, offset, _ = case(rows, ins, outs, dtype, bias)
    out = make(weight, offset, pack)(x)
    assert out.dtype == dtype
    assert worst_row_error(out, reference(x, weight, offset)) <= tolerance(dtype, roundings=1, terms=ins)


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_fused_forms(rows: int, dtype: torch.dtype, pack: bool, bias: bool) -> None:
    """The product rounds, where it is not fused, before the activation, factor or residual rounds again."""
    x, weight, offset, seeded = case(rows, 129, 65, dtype, bias)
    other = seeded.normal(rows, 65, dtype=dtype)
    x_before, other_before = x.clone(), other.clone()
    made, plain = make(weight, offset, pack), reference(x, weight, offset)
    # silu and the sum can be small where the rounded product is not: 3 instead of 2
    allowed = tolerance(dtype, roundings=3, terms=129)
    assert worst_row_error(made.silu(x), F.silu(plain)) <= allowed
    assert worst_row_error(made.times(other, x), other.double() * plain) <= allowed
    assert worst_row_error(made.add_to(other, x), other.double() + plain) <= allowed
    assert torch.equal(x, x_before), "an input was changed"
    assert torch.equal(other, other_before), "an input was changed"


def wrong_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x[:, :-1], weight[:, :-1], bias)


def wrong_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, weight)


def shifted_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, weight, bias.roll(1))


def stale_row(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(torch.cat([x[:-1], x[:1]]), weight, bias)


@pytest.mark.parametrize("bug", [wrong_inputs, wrong_bias, shifted_bias, stale_row], ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_finds(dtype: torch.dtype, bug: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Even the widest tolerance used above."""
    x, weight, bias, _ = case(33, 300, 64, dtype, True)
    assert bias is not None
    error = worst_row_error(bug(x, weight, bias), reference(x, weight, bias))
    assert error > 2 * tolerance(dtype, roundings=3, terms=300)


def test_bytes_are_counted() -> None:
    assert Linear(torch.zeros(3, 5), torch.zeros(3)).nbytes == 4 * (15 + 3)
    assert Linear(torch.zeros(3, 5, dtype=torch.bfloat16), pack=False).nbytes == 30
