"""The staircase FFN against the float64 formula, each row with a width of its own."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sortserve.kernels.ffn import FfnRows, StaircaseFfn, plan_rows, reference
from tests.kernels.closeness import DTYPES, ROWS, Seeded, tolerance, worst_row_error

HIDDEN, WIDTH = 45, 97
BOUNDARIES = [
    pytest.param((WIDTH,), id="one-block"),
    pytest.param((31, WIDTH), id="two-blocks"),
    pytest.param((16, 33, 64, WIDTH), id="four-blocks"),
]
PACK = [pytest.param(True, id="packed"), pytest.param(False, id="plain")]
ORDERS = ("descending", "shuffled", "one-width", "full", "none-full")


class Case:
    """Weights, inputs and the FFN made of them; outputs and residual of size 1."""

    def __init__(
        self, rows: int, boundaries: tuple[int, ...], dtype: torch.dtype, pack: bool = True, bias: bool = False
    ):
        self.seeded = Seeded(rows * 10 + len(boundaries))
        normal = self.seeded.normal
        self.x = normal(rows, HIDDEN, dtype=dtype)
        self.residual = normal(rows, HIDDEN, dtype=dtype)
        self.gate, self.up = (normal(WIDTH, HIDDEN, scale=1.5 * HIDDEN**-0.5, dtype=dtype) for _ in range(2))
        self.down = normal(HIDDEN, WIDTH, scale=WIDTH**-0.5, dtype=dtype)
        self.biases = [normal(size, dtype=dtype) for size in (WIDTH, WIDTH, HIDDEN)] if bias else None
        gate_bias, up_bias, down_bias = self.biases or (None, None, None)
        self.ffn = StaircaseFfn(
            self.gate,
            self.up,
            self.down,
            boundaries,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
            pack=pack,
        )
        self.boundaries, self.dtype = boundaries, dtype

    def widths(self, order: str) -> list[int]:
        count = self.x.shape[0]
        drawn = self.seeded.ints(0, WIDTH + 1, count)
        drawn[: len(self.boundaries)] = self.boundaries[:count]  # the boundaries themselves too
        return {
            "descending": sorted(drawn, reverse=True),
            "shuffled": [drawn[place] for place in self.seeded.permutation(count)],
            "one-width": [WIDTH - 8] * count,
            "full": [WIDTH] * count,
            "none-full": [min(width, 40) for width in drawn],
        }[order]

    def run(self, rows: FfnRows) -> Tensor:
        return self.ffn.add_to(self.residual, self.x, rows)

    def expected(self, widths: list[int]) -> Tensor:
        """The reference; a bias is one more input that is always 1."""
        if self.biases is None:
            return self.residual.double() + reference(self.x, self.gate, self.up, self.down, widths)
        gate_bias, up_bias, down_bias = self.biases
        one = torch.ones(len(widths), 1)
        out = reference(
            torch.cat([self.x, one], 1),
            torch.cat([self.gate, gate_bias[:, None]], 1),
            torch.cat([self.up, up_bias[:, None]], 1),
            self.down,
            widths,
        )
        has_ffn = torch.tensor([width > 0 for width in widths])[:, None]
        return self.residual.double() + out + has_ffn * down_bias.double()


def allowed(dtype: torch.dtype) -> float:
    """In bfloat16 gate, its silu, up, their product, down and the sum with the residual may each round."""
    return tolerance(dtype, roundings=3, terms=WIDTH + HIDDEN)  # six independent ones make sqrt(6) < 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("rows", ROWS)
def test_ffn(rows: int, boundaries: tuple[int, ...], dtype: torch.dtype, pack: bool, order: str) -> None:
    case = Case(rows, boundaries, dtype, pack)
    x, residual = case.x.clone(), case.residual.clone()
    widths = case.widths(order)
    out = case.run(plan_rows(widths, boundaries, dtype))
    assert out.dtype == dtype
    assert worst_row_error(out, case.expected(widths)) <= allowed(dtype)
    skipped = torch.tensor([width == 0 for width in widths])
    assert torch.equal(out[skipped], residual[skipped]), "a row without an FFN keeps its residual bit for bit"
    assert torch.equal(case.x, x), "the input was changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_biases(boundaries: tuple[int, ...], dtype: torch.dtype) -> None:
    """The bias of down counts once for a row, however many blocks it runs, and not at all without an FFN."""
    case = Case(33, boundaries, dtype, bias=True)
    for order in ("descending", "shuffled", "full"):
        widths = case.widths(order)
        assert worst_row_error(case.run(plan_rows(widths, boundaries, dtype)), case.expected(widths)) <= allowed(dtype)


@pytest.mark.parametrize("pack", PACK)
def test_a_row_does_not_depend_on_the_rows_beside_it(pack: bool) -> None:
    """In float32 up to the order of summation: each row alone, on its own width, gives what the batch gave it."""
    case = Case(7, (16, 33, 64, WIDTH), torch.float32, pack)
    widths = [97, 64, 40, 33, 5, 16, 0]
    together = case.run(plan_rows(widths, case.boundaries, torch.float32))
    for row, width in enumerate(widths):
        rows = plan_rows([width], case.boundaries, torch.float32)
        alone = case.ffn.add_to(case.residual[row : row + 1], case.x[row : row + 1], rows)
        assert worst_row_error(alone, together[row : row + 1].double()) <= allowed(torch.float32)


def test_only_blocks_that_a_row_reaches_run() -> None:
    """The work follows the widths: nothing runs past the widest row, and each block only for rows that reach it."""
    plan = plan_rows([64, 64, 20, 16], (16, 33, 64, WIDTH), torch.float32)
    assert [block.first for block in plan.blocks] == [4, 3, 2]
    plan = plan_rows([16, 64, 0, 20], (16, 33, 64, WIDTH), torch.float32)
    assert [None if block.index is None else block.index.tolist() for block in plan.blocks] == [[0, 1, 3], [1, 3], [1]]
    assert plan_rows([0, 0], (16, WIDTH), torch.float32).blocks == ()


@pytest.mark.parametrize("bug", ["one-more", "one-less", "no-mask", "other-row", "block-left-out"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_finds(dtype: torch.dtype, bug: str) -> None:
    """The real kernel, told something wrong about one neuron, mask, row or block."""
    case = Case(33, (16, 33, 64, WIDTH), dtype)
    widths = [2 + width % (WIDTH - 3) for width in case.widths("shuffled")]
    expected = case.expected(widths)
    plan = plan_rows(widths, case.boundaries, dtype)
    assert worst_row_error(case.run(plan), expected) <= allowed(dtype)
    if bug in ("one-more", "one-less"):
        step = 1 if bug == "one-more" else -1
        plan = plan_rows([width + step for width in widths], case.boundaries, dtype)
    elif bug == "no-mask":
        blocks = [dataclasses.replace(block, mask=None) for block in plan.blocks]
        plan = dataclasses.replace(plan, blocks=tuple(blocks))
    elif bug == "other-row":
        plan = plan_rows(widths[1:] + widths[:1], case.boundaries, dtype)
    else:
        plan = dataclasses.replace(plan, blocks=plan.blocks[:-1])
    assert worst_row_error(case.run(plan), expected) > 2 * allowed(dtype)
