"""Int8 weights on the CPU against the float64 formula over the same values, as near as weights of the dtype itself."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.kernels.linear_int8 import Int8Linear, is_exact, reference, split
from sortserve.kernels.quantization import quantize
from tests.kernels.closeness import DTYPES, ROWS, Seeded, tolerance, worst_row_error

pytestmark = pytest.mark.skipif(not is_exact(), reason="oneDNN does not multiply bytes exactly here (no VNNI)")
SIZES = [pytest.param(ins, outs, id=f"{ins}to{outs}") for ins, outs in ((1, 5), (48, 33), (129, 257), (300, 64))]


def allowed(x: Tensor, roundings: float = 1) -> float:
    """The result's roundings, and those of the activations: half a step each, a step being 2^-16 or 2^-24 of twice the
    row's largest value, here at most 5 times its root mean square."""
    planes = 2.0**-17 if x.dtype == torch.float32 else 2.0**-9
    return tolerance(x.dtype, roundings=roundings, terms=max(64, x.shape[1])) + 5 * 2.0**-7 * planes


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ins", "outs"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_all_forms(rows: int, ins: int, outs: int, dtype: torch.dtype, bias: bool) -> None:
    seeded = Seeded(rows * 1000 + ins)
    x, other = seeded.normal(rows, ins, dtype=dtype), seeded.normal(rows, outs, dtype=dtype)
    offset = seeded.normal(outs, dtype=dtype) if bias else None
    values, scale = quantize(seeded.normal(outs, ins, scale=ins**-0.5), "int8")
    before = x.clone(), other.clone()
    made, plain = Int8Linear(values, scale, offset), reference(x, values, scale, offset)
    out = made(x)
    assert out.dtype == dtype
    assert worst_row_error(out, plain) <= allowed(x)
    assert worst_row_error(made.silu(made.prepare(x)), F.silu(plain)) <= allowed(x, 3)
    assert worst_row_error(made.times(other, made.prepare(x)), other.double() * plain) <= allowed(x, 3)
    summed = made.add_to(other, x)
    assert summed.dtype == dtype
    assert worst_row_error(summed, other.double() + plain) <= allowed(x, 3)
    assert torch.equal(x, before[0])
    assert torch.equal(other, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Bit by bit: one huge row must not coarsen the steps of its neighbours."""
    seeded = Seeded(4)
    x = seeded.normal(9, 129, dtype=dtype)
    x[4] *= 1e6
    x[5] = 0.0
    made = Int8Linear(*quantize(seeded.normal(65, 129), "int8"))
    together = made(x)
    for row in range(9):
        assert torch.equal(together[row], made(x[row : row + 1])[0])
    assert (together[5] == 0).all() or together[5].abs().max() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_hold_the_rows(dtype: torch.dtype) -> None:
    """Many rows: the quotient of a row's largest value may round up, which must not wrap around."""
    x = Seeded(5).normal(2000, 37, dtype=dtype)
    planes = split(x)
    parts = planes.data.view(-1, *x.shape).double() - 128
    back = sum(part * 256.0**place for place, part in enumerate(parts.flip(0))) * planes.step
    # float32's own quotient is off by half a step
    assert ((back - x).abs() <= (1.01 if dtype == torch.float32 else 0.51) * planes.step).all()


def one_scale(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return reference(x, values, scale.roll(1))


def eight_bits(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    step = x.abs().amax(1, keepdim=True) / 127
    return reference((x / step).round() * step, values, scale)


def zero_point(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return reference(x, values, scale) + 0.05 * scale.double() * values.double().sum(1)


@pytest.mark.parametrize("bug", [one_scale, eight_bits, zero_point], ids=lambda bug: bug.__name__)
def test_the_tolerance_finds(bug: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """In float32, where the forms are held to it; 8-bit activations among them."""
    seeded = Seeded(6)
    x = seeded.normal(33, 300)
    values, scale = quantize(seeded.normal(64, 300, scale=300**-0.5), "int8")
    assert worst_row_error(bug(x, values, scale), reference(x, values, scale)) > 10 * allowed(x, 3)


def test_bytes_are_counted() -> None:
    """Values, and scale, offset and zero point of each channel."""
    assert Int8Linear(*quantize(torch.ones(3, 5), "int8"), torch.zeros(3)).nbytes == 15 + 3 * 4 * 4
