"""The compiled products against the float64 formulas, in bfloat16, and in int8 for rows of bfloat16 and float32."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sortserve.kernels import linear
from sortserve.kernels.ffn import plan_rows
from sortserve.kernels.ffn import reference as ffn_reference
from sortserve.kernels.native import Native, NativeFfn, NativeLinear
from sortserve.kernels.quantization import dequantize, quantize
from tests.kernels.closeness import KINDS, ROWS, Kind, Seeded, tolerance, worst_row_error

SIZES = [pytest.param(*size, id=f"{size[0]}to{size[1]}") for size in ((1, 5), (48, 33), (129, 257), (300, 64))]
HIDDEN, WIDTH = 45, 97


def allowed(kind: Kind, *, roundings: float, terms: int, inputs: int = 1) -> float:
    """The result's roundings, and for int8 those of the rows that are cut into bytes `inputs` times: half a step each, a
    step being 2^-16 or 2^-24 of twice the row's largest value, here at most 5 times its root mean square."""
    dtype, int8 = kind
    cut = (2.0**-17 if dtype == torch.float32 else 2.0**-9) * 5 * 2.0**-7
    return tolerance(dtype, roundings=roundings, terms=max(64, terms)) + int8 * inputs * cut


def weights(seeded: Seeded, kind: Kind, outs: int, ins: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A matrix [outs, ins], and what the formula is given: itself, or what int8 leaves of it."""
    weight = seeded.normal(outs, ins, scale=scale * ins**-0.5, dtype=kind[0])
    return weight, dequantize(*quantize(weight, "int8"), torch.float32) if kind[1] else weight


def skip_without(native: Native, kind: Kind) -> None:
    if not native.multiplies(kind[0], int8=kind[1]):
        pytest.skip("not on this processor")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ins", "outs"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(native: Native, rows: int, ins: int, outs: int, kind: Kind, bias: bool) -> None:
    """One rounding, also of the sum with the residual."""
    skip_without(native, kind)
    seeded = Seeded(rows * 1000 + ins)
    # a row's neighbours are NaN: nothing beyond it may be read into it
    x, residual = (seeded.normal(rows + 2, size, dtype=kind[0]) for size in (ins, outs))
    x[[0, -1]] = residual[[0, -1]] = torch.nan
    x, residual = x[1:-1], residual[1:-1]
    before = x.clone(), residual.clone()
    weight, known = weights(seeded, kind, outs, ins)
    offset = seeded.normal(outs, dtype=kind[0]) if bias else None
    made, plain = NativeLinear(native, weight, offset, int8=kind[1]), linear.reference(x, known, offset)
    limit = allowed(kind, roundings=1, terms=ins)
    assert made(x).dtype == kind[0]
    assert worst_row_error(made(x), plain) <= limit
    # the sum may be small where the product is not: twice the error of the product
    assert worst_row_error(made.add_to(residual, x), residual.double() + plain) <= 2 * limit
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


class Case:
    """An FFN, its rows, and the formula's answer."""

    def __init__(self, native: Native, kind: Kind, rows: int, *, bias: bool = False) -> None:
        skip_without(native, kind)
        self.kind, self.seeded = kind, Seeded(rows * 10 + kind[1])
        normal = self.seeded.normal
        self.x, self.residual = (normal(rows, HIDDEN, dtype=kind[0]) for _ in range(2))
        sizes = ((WIDTH, HIDDEN, 1.5), (WIDTH, HIDDEN, 1.5), (HIDDEN, WIDTH, 1.0))
        made = [weights(self.seeded, kind, *size) for size in sizes]
        self._known = [known for _, known in made]
        self._biases = [normal(size, dtype=kind[0]) for size in (WIDTH, WIDTH, HIDDEN)] if bias else [None] * 3
        (gate, _), (up, _), (down, _) = made
        gate_bias, up_bias, down_bias = self._biases
        self.ffn = NativeFfn(
            native, gate, up, down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias, int8=kind[1]
        )

    def widths(self) -> list[int]:
        """Odd ones in no order, the full one, none, and those at the edges of what is computed at a time."""
        count = len(self.x)
        drawn = [WIDTH, 0, 16, 31, 32, 33, 1, *self.seeded.ints(0, WIDTH + 1, count)][:count]
        return [drawn[place] for place in self.seeded.permutation(count)]

    def run(self, widths: list[int], rows: slice = slice(None)) -> Tensor:
        return self.ffn.add_to(self.residual[rows], self.x[rows], plan_rows(widths, (), self.kind[0]))

    def expected(self, widths: list[int]) -> Tensor:
        """The formula; a bias of gate or up is one more input, which is 1."""
        gate, up, down = self._known
        x, down_bias = self.x, self._biases[2]
        if down_bias is not None:
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
            gate, up = (
                torch.cat([one, bias[:, None]], 1)
                for one, bias in zip((gate, up), self._biases[:2], strict=True)
                if bias is not None
            )
        out = self.residual.double() + ffn_reference(x, gate, up, down, widths)
        has_ffn = torch.tensor([width > 0 for width in widths])[:, None]
        return out if down_bias is None else out + has_ffn * down_bias.double()

    @property
    def limit(self) -> float:
        """The inner product rounds, or is cut into bytes, between the matrices: half as large again as in one of them."""
        return 1.5 * allowed(self.kind, roundings=2, terms=HIDDEN + WIDTH, inputs=2)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_ffn(native: Native, rows: int, kind: Kind, bias: bool) -> None:
    case = Case(native, kind, rows, bias=bias)
    for widths in (case.widths(), [WIDTH] * rows, [WIDTH - 8] * rows):
        out = case.run(widths)
        assert out.dtype == kind[0]
        assert worst_row_error(out, case.expected(widths)) <= case.limit
        skipped = torch.tensor([width == 0 for width in widths])
        assert torch.equal(out[skipped], case.residual[skipped]), "a row without an FFN keeps its residual bit for bit"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_bits_in_every_batch(native: Native, kind: Kind) -> None:
    """Alone, beside others, beside one huge row, and beside one that is not finite."""
    case = Case(native, kind, 29, bias=True)
    made = NativeLinear(native, weights(case.seeded, kind, 65, HIDDEN)[0], int8=kind[1])
    widths = case.widths()
    case.x[4] *= 1e6
    case.x[5] = torch.inf
    together, product = case.run(widths), made(case.x)
    assert not product[5].isfinite().any()
    for row in range(29):
        one = slice(row, row + 1)
        if row != 5:
            assert torch.equal(made(case.x[one])[0], product[row])
            assert torch.equal(case.run(widths[one], one)[0], together[row])
    for few in (2, 3, 5, 8, 13):
        assert torch.equal(made(case.x[6 : 6 + few]), product[6 : 6 + few])


def test_int8_as_precise_as_its_rows(native: Native) -> None:
    """In bfloat16 the cut rows lose 2^-16 of their largest value, not a rounding of bfloat16: seen in float32."""
    seeded = Seeded(7)
    weight, known = weights(seeded, (torch.float32, True), 64, 300)
    x = seeded.normal(33, 300)
    coarse = NativeLinear(native, weight, int8=True)(x)
    assert worst_row_error(coarse, linear.reference(x, known)) < 2.0**-20


def wider(case: Case, widths: list[int]) -> Tensor:
    return case.run([width + 1 for width in widths])


def narrower(case: Case, widths: list[int]) -> Tensor:
    return case.run([width - 1 for width in widths])


def of_others(case: Case, widths: list[int]) -> Tensor:
    return case.run(widths[1:] + widths[:1])


def of_the_widest(case: Case, widths: list[int]) -> Tensor:
    return case.run([max(widths)] * len(widths))


def stale_row(case: Case, widths: list[int]) -> Tensor:
    case.x[0] = case.x[1]
    return case.run(widths)


@pytest.mark.parametrize(
    "bug", [wider, narrower, of_others, of_the_widest, stale_row], ids=lambda bug: str(bug.__name__)
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tolerance_finds(native: Native, kind: Kind, bug: Callable[[Case, list[int]], Tensor]) -> None:
    """The real kernel, told something wrong of one neuron or row."""
    case = Case(native, kind, 33)
    widths = [2 + width % (WIDTH - 3) for width in case.widths()]
    expected = case.expected(widths)
    assert worst_row_error(case.run(widths), expected) <= case.limit
    assert worst_row_error(bug(case, widths), expected) > 2 * case.limit


def test_wrong_calls_are_refused(native: Native) -> None:
    """Sizes and dtypes are checked before a pointer is handed over."""
    weight = torch.ones(64, 32, dtype=torch.bfloat16)
    made = NativeLinear(native, weight)
    calls: list[Callable[[], object]] = [
        lambda: made(torch.ones(2, 31, dtype=torch.bfloat16)),
        lambda: made(torch.ones(2, 32)),
        lambda: made(torch.ones(32, dtype=torch.bfloat16)),
        lambda: made.add_to(torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(2, 32, dtype=torch.bfloat16)),
        lambda: made.add_to(torch.ones(2, 64), torch.ones(2, 32, dtype=torch.bfloat16)),
        lambda: NativeLinear(native, weight.double()),
    ]
    case = Case(native, (torch.bfloat16, False), 3)
    plan = plan_rows([WIDTH, 1, 0], (), torch.bfloat16)
    calls += [
        lambda: case.run([WIDTH, WIDTH + 1, 0]),
        lambda: case.run([WIDTH, 1]),
        lambda: case.ffn.add_to(case.residual, case.x, dataclasses.replace(plan, widths=plan.widths.long())),
    ]
    for call in calls:
        with pytest.raises(AssertionError):
            call()


def test_bytes_are_counted(native: Native) -> None:
    """Whole panels of 64 outputs; int8 has a scale of each."""
    weight = torch.ones(3, 5)
    assert NativeLinear(native, weight.bfloat16()).nbytes == 64 * 6 * 2
    assert NativeLinear(native, weight, torch.ones(3), int8=True).nbytes == 64 * 8 + 64 * 4 + 64 * 4
