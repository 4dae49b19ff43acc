"""Products with weights of any format, cut row by row, split over the reduction, against the float64 formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import tiling
from sortserve.kernels.gpu.linear import linear
from sortserve.kernels.gpu.product import product, reference
from tests.kernels.closeness import ROWS, Seeded, tolerance, worst_row_error
from tests.kernels.gpu.guarded import Guarded

INNER, OUT = 1100, 70
FORMATS = [
    pytest.param(None, id="plain"),
    pytest.param(torch.int8, id="int8"),
    pytest.param(torch.float8_e4m3fn, id="fp8"),
]


class Case:
    def __init__(self, rows: int, narrow: torch.dtype | None = None, dtype: torch.dtype = torch.float32) -> None:
        seeded = Seeded(rows + 17)
        self.dtype = dtype
        x = seeded.normal(rows, INNER, dtype=dtype)
        weight = seeded.normal(OUT, INNER, scale=INNER**-0.5)
        self.scale: Tensor | None = None
        if narrow is not None:
            self.scale = Guarded.of(weight.abs().amax(1) / (127.0 if narrow == torch.int8 else 448.0)).tensor
            weight = weight / self.scale[:, None]
        self.weight = Guarded.of(weight.to(narrow or dtype)).tensor
        self.bias = Guarded.of(seeded.normal(OUT, dtype=dtype)).tensor
        self.residual = Guarded.of(seeded.normal(rows, OUT, dtype=dtype)).tensor
        limits = sorted([*seeded.ints(0, INNER + 1, rows), INNER, 0], reverse=True)[:rows]
        x[torch.arange(INNER)[None] >= torch.tensor(limits)[:, None]] = 0.0  # as the first kernel of the FFN leaves it
        self.x = Guarded.of(x).tensor
        self.limits = Guarded.of(torch.tensor(limits, dtype=torch.int32)).tensor

    def given(self, **changed: Any) -> dict[str, Any]:
        names = ("x", "weight", "scale", "bias", "residual", "limits")
        return {name: getattr(self, name) for name in names} | changed

    def allowed(self) -> float:
        return tolerance(self.dtype, roundings=1, terms=INNER)


@pytest.mark.parametrize("narrow", FORMATS)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, narrow: torch.dtype | None) -> None:
    if rows == 129 and narrow is not None:
        pytest.skip("the interpreter takes five seconds for 129 rows: in one format")
    case = Case(rows, narrow)
    out = Guarded((rows, OUT), case.dtype)
    product(**case.given(out=out.tensor))
    assert out.untouched()
    assert worst_row_error(out.tensor, reference(**case.given())) <= case.allowed()


def test_float16() -> None:
    case = Case(7, torch.int8, torch.float16)
    assert worst_row_error(product(**case.given()), reference(**case.given())) <= case.allowed()


def test_what_lies_beyond_a_limit_is_not_read() -> None:
    case = Case(7)
    limits = case.limits.clamp_max(300)
    x = case.x.masked_fill(torch.arange(INNER)[None] >= limits[:, None], 0.0)
    poisoned = x.clone()
    poisoned[:, 384:] = float("nan")  # 300 and what is left of its COVER of 128
    expected = reference(**case.given(x=x, limits=limits))
    assert worst_row_error(product(**case.given(x=poisoned, limits=limits)), expected) <= case.allowed()


def test_the_split_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(5)
    whole: list[Tensor] = []
    for processors in (1, 1000):
        monkeypatch.setattr(tiling, "card_of", lambda device, count=processors: tiling.Card(count, 227 << 10))
        whole.append(product(**case.given()))
        assert worst_row_error(whole[-1], reference(**case.given())) <= case.allowed()
    assert not torch.equal(whole[0], whole[1]), "both ran unsplit"


def test_the_residual_may_be_the_result() -> None:
    case = Case(5)
    expected = product(**case.given())
    made = case.residual.clone()
    assert torch.equal(product(**case.given(residual=made, out=made)), expected)


def test_planted_bugs_are_found() -> None:
    case = Case(7, torch.int8)
    right, allowed = reference(**case.given()), case.allowed()
    for change in (
        {"limits": (case.limits - 128).clamp_min(0)},
        {"scale": None if case.scale is None else case.scale.roll(1)},
        {"residual": None},
        {"bias": None},
    ):
        assert worst_row_error(product(**case.given(**change)), right) > 4 * allowed, change.keys()


def test_linear_takes_any_format() -> None:
    for narrow in (None, torch.int8):
        case = Case(5, narrow)
        given = case.given()
        given.pop("limits")
        assert worst_row_error(linear(**given), reference(**given)) <= case.allowed()
        out = torch.empty(5, OUT)
        assert linear(**given, out=out) is out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_with_plain_weights(bias: bool, residual: bool) -> None:
    seeded = Seeded(5)
    x, weight = seeded.normal(5, 24), seeded.normal(9, 24)
    extra = (seeded.normal(9) if bias else None, seeded.normal(5, 9) if residual else None)
    expected = reference(x, weight, None, *extra)
    allowed = tolerance(torch.float32, roundings=3, terms=24)
    out = torch.empty(5, 9)
    for target in (None, out):
        made = linear(x, weight, extra[0], residual=extra[1], out=target)
        assert worst_row_error(made, expected) <= allowed
    assert worst_row_error(out, expected) <= allowed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": None}, "has no scale"),
        ({"scale": torch.ones(OUT, dtype=torch.float64)}, "expected float32"),
        ({"weight": torch.ones(OUT, INNER, dtype=torch.float64), "scale": None}, "expected the same, int8"),
        ({"limits": torch.ones(4, dtype=torch.int32)}, "limits"),
        ({"out": torch.empty(5, OUT, dtype=torch.float16)}, "dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        product(**Case(5, torch.int8).given(**change))
    with pytest.raises(ValueError, match="x is"):
        linear(torch.zeros(2, 8), torch.zeros(4, 9))
