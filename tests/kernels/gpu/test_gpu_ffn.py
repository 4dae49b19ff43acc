"""The staircase FFN on the interpreter: every row with its own width, against float64, in the middle of NaN.

Inner activations and the result are rounded once each; the products sum `hidden` and `width` terms in float32.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import ffn, ffn_tma, product
from sortserve.kernels.gpu.ffn import FfnScratch, GatedWeights, reference, staircase_ffn
from tests.kernels.closeness import ROWS, Seeded, tolerance, worst_row_error
from tests.kernels.gpu.guarded import Guarded

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
HIDDEN, WIDTH = 72, 200


class Case:
    """Random rows whose widths run from 0 to the full one, in no order, and weights between margins of NaN."""

    def __init__(
        self,
        rows: int,
        dtype: torch.dtype,
        *,
        hidden: int = HIDDEN,
        width: int = WIDTH,
        bias: bool = False,
        kind: str = "",
        tma: bool = False,
    ) -> None:
        self.tma = tma
        seeded = Seeded(rows + width)
        self.dtype, self.width, self.guards = dtype, width, list[Guarded]()
        widths = [*seeded.ints(0, width + 1, rows - 2), 0, width][:rows] if rows > 1 else [width - 3]
        self.widths = torch.tensor(widths, dtype=torch.int32)
        self.x = self.guarded(seeded.normal(rows, hidden, dtype=dtype))
        self.residual = self.guarded(seeded.normal(rows, hidden, dtype=dtype))
        fields: dict[str, Tensor] = {}
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            weight = seeded.normal(*shape, scale=shape[1] ** -0.5)
            if kind == "":
                fields[name] = self.guarded(weight.to(dtype))
            else:
                scale = weight.abs().amax(1) / (127 if kind == "int8" else 448)
                values = weight / scale[:, None]
                narrow = values.round().to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)
                fields[name], fields[f"{name}_scale"] = self.guarded(narrow), self.guarded(scale)
            if bias:
                fields[f"{name}_bias"] = self.guarded(seeded.normal(shape[0], dtype=dtype))
        self.weights = GatedWeights(**fields)

    def guarded(self, values: Tensor) -> Tensor:
        self.guards.append(Guarded.of(values))
        return self.guards[-1].tensor

    def run(self, activation: ffn.Activation = "silu", **changed: Any) -> Tensor:
        """With poisoned scratch and output; all margins must be what they were."""
        arguments: dict[str, Any] = dict(
            {
                "tma": self.tma,
                "x": self.x,
                "weights": self.weights,
                "widths": self.guarded(self.widths),
                "residual": self.residual,
            },
            **changed,
        )
        made = FfnScratch.for_rows(len(self.x), self.weights, self.x)
        inner = Guarded(tuple(made.inner.shape), self.dtype)
        parts, out = Guarded(tuple(made.parts.shape), torch.float32), Guarded(tuple(self.x.shape), self.dtype)
        scratch = FfnScratch(inner.tensor, parts.tensor)
        result = staircase_ffn(**arguments, activation=activation, scratch=scratch, out=out.tensor)
        assert result is out.tensor
        assert all(guard.untouched() for guard in (*self.guards, inner, parts, out))
        return result

    def expected(self, activation: ffn.Activation = "silu") -> Tensor:
        return reference(self.x, self.weights, self.widths, self.residual, activation)

    def allowed(self) -> float:
        return tolerance(self.dtype, roundings=2, terms=self.x.shape[1] + self.width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and rows in (1, 129):
        pytest.skip("the interpreter takes seconds each: two sizes in half precision")
    case = Case(rows, dtype)
    assert worst_row_error(case.run(), case.expected()) <= case.allowed()


def test_zero_width_is_the_residual_bit_for_bit() -> None:
    case = Case(7, torch.float16, bias=True)
    zero = case.widths == 0
    assert zero.any()
    assert torch.equal(case.run()[zero], case.residual[zero])
    nothing = case.run(widths=torch.zeros(7, dtype=torch.int32), residual=None)
    assert (nothing == 0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_biases(activation: ffn.Activation) -> None:
    case = Case(7, torch.float32, bias=True)
    assert worst_row_error(case.run(activation), case.expected(activation)) <= case.allowed()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_narrow_weights(kind: str) -> None:
    case = Case(7, torch.float32, kind=kind)
    assert worst_row_error(case.run(), case.expected()) <= case.allowed()


@pytest.mark.parametrize("rows", [1, 33])
def test_a_split_reduction(rows: int) -> None:
    """All parts of all widths: a row of 1 neuron leaves most parts empty, which are then not read."""
    case = Case(rows, torch.float32, hidden=40, width=1100)
    assert ffn.launches(rows, case.x, case.weights) == 3
    assert worst_row_error(case.run(), case.expected()) <= case.allowed()
    narrow = torch.ones(rows, dtype=torch.int32)
    expected = reference(case.x, case.weights, narrow, case.residual)
    assert worst_row_error(case.run(widths=narrow), expected) <= case.allowed()


def test_a_row_does_not_see_its_batch_mates() -> None:
    case = Case(7, torch.float32, hidden=40, width=1100)
    before = case.run().clone()
    case.x[1:] *= 2.0
    assert torch.equal(case.run()[0], before[0])


def test_many_rows_walk_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "GROUP_ROWS", 2)
    case = Case(300, torch.float32, hidden=16, width=130)
    assert worst_row_error(case.run(), case.expected()) <= case.allowed()


def test_no_rows() -> None:
    case = Case(1, torch.float32)
    none = torch.empty(0, HIDDEN)
    assert staircase_ffn(none, case.weights, torch.empty(0, dtype=torch.int32), none).shape == (0, HIDDEN)


BUGS = (
    "one-wider",
    "one-narrower",
    "batch-widest",
    "no-activation-mask",
    "stale-inner",
    "gate-up-swapped",
    "no-residual",
)


@pytest.mark.parametrize("bug", BUGS)
def test_the_tolerance_finds(bug: str) -> None:
    _find(bug, Case(7, torch.float16))


@pytest.mark.parametrize("bug", ["one-wider", "one-narrower", "batch-widest", "gate-up-swapped", "no-residual"])
def test_the_tolerance_finds_with_tma(bug: str) -> None:
    _find(bug, Case(65, torch.float16, hidden=24, width=136, tma=True))


def _find(bug: str, case: Case) -> None:
    width = case.width
    expected, changed = case.expected(), dict[str, Any]()
    if bug in ("one-wider", "one-narrower"):
        step = 1 if bug == "one-wider" else -1
        changed["widths"] = (case.widths + step).clamp(0, width).to(torch.int32)
    elif bug == "batch-widest":
        changed["widths"] = torch.full_like(case.widths, int(case.widths.max()))
    elif bug == "no-activation-mask":  # the second kernel gets what a first one without a mask would leave
        wide = _inner(case, torch.full_like(case.widths, WIDTH))
        out = product.product(wide, case.weights.down, residual=case.residual, limits=case.widths)
        assert worst_row_error(out, expected) > 4 * case.allowed()
        return
    elif bug == "stale-inner":  # a tile of zeros that is not stored leaves what a wider step left there
        wide, own = _inner(case, torch.full_like(case.widths, WIDTH)), _inner(case, case.widths)
        own[:, 128:] = torch.where(own[:, 128:] == 0, wide[:, 128:], own[:, 128:])
        out = product.product(own, case.weights.down, residual=case.residual, limits=case.widths)
        assert worst_row_error(out, expected) > 4 * case.allowed()
        return
    elif bug == "gate-up-swapped":
        changed["weights"] = dataclasses.replace(case.weights, gate=case.weights.up, up=case.weights.gate)
    else:
        changed["residual"] = None
    assert worst_row_error(case.run(**changed), expected) > 4 * case.allowed()


def _inner(case: Case, widths: Tensor) -> Tensor:
    scratch = FfnScratch.for_rows(len(case.x), case.weights, case.x)
    scratch.inner.zero_()
    staircase_ffn(case.x, case.weights, widths, scratch=scratch)
    return scratch.inner.view(len(case.x), WIDTH).clone()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"widths": torch.zeros(3, dtype=torch.int64)}, "int32"),
        ({"widths": torch.zeros(4, dtype=torch.int32)}, "widths"),
        ({"x": torch.zeros(3, HIDDEN + 1)}, "x is"),
        ({"x": torch.zeros(HIDDEN, 3).T}, "not contiguous"),
        ({"residual": torch.zeros(2, HIDDEN)}, "residual"),
        ({"activation": "relu"}, "relu"),
        ({"out": torch.zeros(3, HIDDEN, dtype=torch.float16)}, "float16"),
        ({"scratch": FfnScratch(torch.zeros(1), torch.zeros(1))}, "scratch"),
    ],
    ids=["widths-dtype", "widths", "hidden", "strides", "residual", "activation", "out", "scratch"],
)
def test_refuses(changed: dict[str, Any], told: str) -> None:
    case = Case(3, torch.float32)
    arguments: dict[str, Any] = {"x": case.x, "weights": case.weights, "widths": case.widths} | changed
    with pytest.raises(ValueError, match=told):
        staircase_ffn(**arguments)


def test_refuses_narrow_weights_without_a_scale() -> None:
    case = Case(3, torch.float32, kind="int8")
    with pytest.raises(ValueError, match="no scale"):
        staircase_ffn(case.x, dataclasses.replace(case.weights, down_scale=None), case.widths)


# ---- with tensor descriptors (ffn_tma.py): the same cases and the same bugs, from 65 rows on


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param(65, {"bias": True}, id="65-bias"),
        pytest.param(129, {}, id="129"),
        pytest.param(300, {"hidden": 16, "width": 136}, id="300-persistent"),
    ],
)
def test_tma(rows: int, options: dict[str, Any]) -> None:
    case = Case(rows, torch.float32, tma=True, **options)
    activation: ffn.Activation = "gelu_tanh" if options else "silu"
    assert _kernels(case, activation) == ["gate_up_tma_kernel", "down_tma_kernel"]


def test_tma_computes_what_the_other_kernels_do() -> None:
    """The same tiles and order of sums: bit for bit."""
    case = Case(70, torch.float16)
    assert torch.equal(case.run(tma=True), case.run(tma=False))


def test_tma_leaves_what_it_cannot_take_to_the_other_kernels() -> None:
    """Narrow weights, rows that are no multiple of 16 bytes, few rows; and of a split reduction the half that is split."""
    cases = [
        Case(65, torch.float32, hidden=32, width=144, kind="int8", tma=True),
        Case(65, torch.float32, hidden=24, width=137, tma=True),
        Case(64, torch.float32, hidden=24, width=136, tma=True),
    ]
    for case in cases:
        assert _kernels(case) == ["gate_up_kernel", "product_kernel"]
    split = Case(65, torch.float32, hidden=40, width=1104, tma=True)
    assert _kernels(split) == ["gate_up_tma_kernel", "product_kernel", "add_parts_kernel"]


def _kernels(case: Case, activation: ffn.Activation = "silu") -> list[str]:
    """Names of the kernels that a call starts, in order; its result must be right."""
    started: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (ffn_tma, ffn, product):
            for name in dir(module):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, _Noting(name, getattr(module, name), started))
        assert worst_row_error(case.run(activation), case.expected(activation)) <= case.allowed()
    return started


class _Noting:
    def __init__(self, name: str, kernel: Any, started: list[str]) -> None:
        self._name, self._kernel, self._started = name, kernel, started

    def __getitem__(self, grid: Any) -> Any:
        self._started.append(self._name)
        return self._kernel[grid]
