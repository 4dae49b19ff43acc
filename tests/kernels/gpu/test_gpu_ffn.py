"""The staircase FFN on a GPU against the float64 formula, each row with a width of its own; the bugs that it must not have
are planted."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import ffn, product
from sortserve.kernels.gpu.ffn import Activation, GatedWeights, reference, staircase_ffn
from tests.kernels.closeness import ROWS, Seeded, tolerance, worst_row_error
from tests.kernels.gpu.guarded import Guarded

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
HIDDEN, WIDTH = 45, 150  # of no tile a multiple
FULL = [WIDTH] * 3


class Case:
    """Random weights, rows and widths, everything between poisoned margins."""

    def __init__(
        self,
        rows: int,
        dtype: torch.dtype,
        *,
        widths: list[int] | None = None,
        bias: bool = False,
        narrow: torch.dtype | None = None,
    ) -> None:
        self.seeded = Seeded(rows * 7 + HIDDEN)
        normal = self.seeded.normal
        self.dtype = dtype
        self.x = Guarded.of(normal(rows, HIDDEN, dtype=dtype)).tensor
        self.residual = Guarded.of(normal(rows, HIDDEN, dtype=dtype)).tensor
        drawn = sorted([*self.seeded.ints(0, WIDTH + 1, rows), WIDTH, 0, 64], reverse=True)[:rows]
        self.widths = Guarded.of(torch.tensor(widths or drawn, dtype=torch.int32)).tensor
        scale = {"gate": HIDDEN**-0.5, "up": HIDDEN**-0.5, "down": WIDTH**-0.5}
        shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        made: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            weight = normal(*shape, scale=2 * scale[name])
            if narrow is not None:
                largest = weight.abs().amax(1) / (127.0 if narrow == torch.int8 else 448.0)
                weight = weight / largest[:, None]
                weight = weight.round().to(narrow) if narrow == torch.int8 else weight.to(narrow)
                made[f"{name}_scale"] = Guarded.of(largest).tensor
            else:
                weight = weight.to(dtype)
            made[name] = Guarded.of(weight).tensor
        if bias:
            made |= {f"{name}_bias": Guarded.of(normal(shapes[name][0], dtype=dtype)).tensor for name in shapes}
        self.weights = GatedWeights(**made)

    def run(self, activation: Activation = "silu", **changed: Any) -> Tensor:
        rows = self.x.shape[0]
        out, inner = Guarded((rows, HIDDEN), self.dtype), Guarded((rows, WIDTH), self.dtype)
        given: dict[str, Any] = {"x": self.x, "widths": self.widths, "residual": self.residual} | changed
        made = staircase_ffn(
            given["x"],
            self.weights,
            given["widths"],
            given["residual"],
            activation=activation,
            inner=inner.tensor,
            out=out.tensor,
        )
        assert made is out.tensor
        assert out.untouched()
        assert inner.untouched()
        # of each row, only what lies below its width was written
        beyond = torch.arange(WIDTH)[None] >= self.widths[:, None]
        assert inner.tensor[beyond].isnan().all()
        return made

    def error(self, out: Tensor, activation: Activation = "silu") -> float:
        return worst_row_error(out, reference(self.x, self.weights, self.widths, self.residual, activation))

    def allowed(self) -> float:
        """Activations and result are rounded once each, and the sum over at most WIDTH neurons and HIDDEN inputs is float32;
        the activation's slope is at most 1.1, and rounding it costs a result as large as the residual."""
        return tolerance(self.dtype, roundings=3, terms=HIDDEN + WIDTH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, dtype: torch.dtype) -> None:
    case = Case(rows, dtype)
    assert case.error(case.run()) <= case.allowed()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_and_biases(activation: Activation) -> None:
    case = Case(9, torch.float32, bias=True)
    assert case.error(case.run(activation), activation) <= case.allowed()


@pytest.mark.parametrize("narrow", [pytest.param(torch.int8, id="int8"), pytest.param(torch.float8_e4m3fn, id="fp8")])
def test_narrow_weights(narrow: torch.dtype) -> None:
    """The scales of `down` are of the whole reduction: a narrow row uses the same ones."""
    case = Case(5, torch.float32, narrow=narrow)
    assert case.error(case.run()) <= case.allowed()


def test_a_row_of_no_width_is_its_residual() -> None:
    case = Case(4, torch.float32, widths=[70, 0, 0, 0], bias=True)
    assert torch.equal(case.run()[1:], case.residual[1:])


def test_many_rows_walk_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The persistent form, with fewer programs than tiles."""
    monkeypatch.setattr(ffn, "PERSISTENT_ROWS", 1)
    monkeypatch.setattr(ffn, "processors_of", lambda device: 1)
    case = Case(33, torch.float32)
    assert case.error(case.run()) <= case.allowed()


def test_a_row_is_the_same_whoever_is_beside_it() -> None:
    """Its tile's widest row decides what is read, not what is added up."""
    case = Case(7, torch.float32, widths=[WIDTH, 120, 90, 64, 64, 10, 1])
    together = case.run()
    for row in (2, 5):
        alone = staircase_ffn(
            case.x[row : row + 1].clone(),
            case.weights,
            case.widths[row : row + 1].clone(),
            case.residual[row : row + 1].clone(),
        )
        assert torch.equal(alone[0], together[row])


def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths off by one, the mask of the down projection left out, a tile that stops early, and a scale of another row."""
    case = Case(7, torch.float32, widths=[WIDTH - 3, 120, 90, 70, 65, 30, 20])
    for change in (-1, 1):
        out = staircase_ffn(case.x, case.weights, case.widths + change, case.residual)
        assert case.error(out) > 4 * case.allowed()

    def without_limits(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        bias_and_more = (*others[:3], None, *others[4:])
        return product.product(x.nan_to_num(0.5), weight, *bias_and_more)

    monkeypatch.setattr(ffn, "product", without_limits)
    assert case.error(case.run()) > 4 * case.allowed()
    monkeypatch.undo()
    narrow = Case(5, torch.float32, narrow=torch.int8)
    assert narrow.weights.up_scale is not None
    narrow.weights.up_scale.copy_(narrow.weights.up_scale.roll(1))
    shifted = narrow.run()
    narrow.weights.up_scale.copy_(narrow.weights.up_scale.roll(-1))
    assert narrow.error(shifted) > 4 * narrow.allowed()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": torch.ones(3, dtype=torch.int64)}, "int32"),
        ({"widths": torch.ones(4, dtype=torch.int32)}, r"\(4,\), expected \(3,\)"),
        ({"x": torch.ones(3, HIDDEN + 1)}, "expected"),
        ({"x": torch.ones(HIDDEN, 3).T}, "not contiguous"),
        ({"residual": torch.ones(2, HIDDEN)}, "residual"),
        ({"x": torch.ones(3, HIDDEN, dtype=torch.float16)}, "gate is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Case(3, torch.float32, widths=FULL).run(**change)


def test_no_rows() -> None:
    case = Case(3, torch.float32, widths=FULL)
    empty = staircase_ffn(case.x[:0], case.weights, case.widths[:0], case.residual[:0])
    assert empty.shape == (0, HIDDEN)
