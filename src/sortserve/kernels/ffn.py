"""The staircase gated FFN: y = down(silu(gate x) * up x), with a width of its own for every row.

Sorted neurons make each width a prefix: gate and up keep rows [0, w), down keeps columns [0, w). The weights are packed
in a few column blocks; a block runs for the rows that reach into it, and what a row's width leaves of its last block is
zeroed before `down`. No weight is sliced into a copy, and partial sums accumulate in float32.

    neurons   0 ......... 128 ......... 256 ......... 512
    row 0     ########### ########### ###########      w = 512: blocks 0, 1, 2
    row 1     ###########                              w = 128: block 0
    row 2     ########### ####.......                  w = 192: blocks 0, 1, the rest of 1 masked
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.kernels.linear import Linear
from sortserve.kernels.linear_int8 import Int8Linear
from sortserve.kernels.quantization import quantize


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Which rows run a block. `first`: the first so many, None: those of `index`. `mask` [rows, block width], 0 or 1,
    is None where every row runs the whole block."""

    first: int | None
    index: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FfnRows:
    """The blocks that some row runs, and by how many rows in all; and each row's own width."""

    num_rows: int
    blocks: tuple[BlockRows, ...]
    widths: Tensor  # int32 [num_rows], 0: no FFN
    widest: int


def plan_rows(widths: Sequence[int], boundaries: Sequence[int], dtype: torch.dtype) -> FfnRows:
    """Lay out rows of these widths (0: no FFN) over the blocks that end at `boundaries`; none for an FFN without blocks."""
    blocks = []
    start = 0
    for end in boundaries:
        inside = [row for row, width in enumerate(widths) if width > start]
        if not inside:
            break
        contiguous = inside[-1] == len(inside) - 1
        partial = [min(widths[row], end) - start for row in inside]
        mask = None
        if min(partial) < end - start:
            mask = (torch.arange(end - start)[None, :] < torch.tensor(partial)[:, None]).to(dtype)
        index = None if contiguous else torch.tensor(inside)
        blocks.append(BlockRows(len(inside) if contiguous else None, index, mask))
        start = end
    return FfnRows(len(widths), tuple(blocks), torch.tensor(widths, dtype=torch.int32), max(widths, default=0))


class GatedFfn(Protocol):
    """The FFN of one layer, in whatever form."""

    boundaries: tuple[int, ...]  # where its blocks end, for `plan_rows`; () if it has none

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, in whatever layout."""

    def add_to(self, residual: Tensor, x: Tensor, rows: FfnRows) -> Tensor:
        """residual [rows, hidden] + FFN(x [rows, hidden]); rows without an FFN keep their residual."""


class StaircaseFfn:
    """The FFN of one layer, in blocks that end at `boundaries` (ascending, the last one the full width)."""

    def __init__(
        self,
        gate: Tensor,  # [width, hidden]
        up: Tensor,  # [width, hidden]
        down: Tensor,  # [hidden, width]
        boundaries: Sequence[int],
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        pack: bool = True,
        int8: bool = False,
    ) -> None:
        """`int8`: quantized whole and then cut, so that a width's weights do not depend on where the blocks end."""
        self.boundaries = tuple(boundaries)
        self._gate: list[Linear] = []
        self._up: list[Linear] = []
        self._down: list[Linear] = []
        make_gate, make_up, make_down = (_maker(weight, pack=pack, int8=int8) for weight in (gate, up, down))
        start = 0
        for end in boundaries:
            rows = slice(start, end)
            self._gate.append(make_gate(rows, _ALL, None if gate_bias is None else gate_bias[rows]))
            self._up.append(make_up(rows, _ALL, None if up_bias is None else up_bias[rows]))
            self._down.append(make_down(_ALL, rows, down_bias if start == 0 else None))
            start = end

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, in whatever layout."""
        return tuple(linear.weight for linear in (*self._gate, *self._up, *self._down))

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(linear.nbytes for linear in (*self._gate, *self._up, *self._down))

    def add_to(self, residual: Tensor, x: Tensor, rows: FfnRows) -> Tensor:
        """residual [rows, hidden] + FFN(x [rows, hidden]); rows without an FFN keep their residual."""
        blocks = rows.blocks
        if not blocks:
            return residual
        if all(block.first == rows.num_rows for block in blocks):
            return self._add_uniform(residual, x, blocks)
        total: Tensor | None = None  # float32 [rows, hidden]
        for number, block in enumerate(blocks):
            if block.index is not None:
                part = self._down[number](self._activate(number, x[block.index], block.mask))
                total = torch.zeros(x.shape, dtype=torch.float32) if total is None else total
                total.index_add_(0, block.index, part.float())
                continue
            part = self._down[number](self._activate(number, x[: block.first], block.mask))
            if total is None:
                total = part.float()
                if block.first != rows.num_rows:
                    total = torch.cat([total, total.new_zeros(rows.num_rows - total.shape[0], total.shape[1])])
            else:
                total[: block.first] += part
        assert total is not None
        return total.add_(residual).to(residual.dtype)

    def _add_uniform(self, residual: Tensor, x: Tensor, blocks: Sequence[BlockRows]) -> Tensor:
        """`add_to` where every row runs every block: the sum rides on the products, float32 inside each and rounded
        between them. An extra block costs 57 us instead of 166 at one row, and the logits of the 0.5B model in four
        blocks are as near to float32 as with a float32 sum (0.0066 against 0.0060 in one block; adding block by block to
        the residual itself would be 0.0076)."""
        first, *others = (self._activate(number, x, block.mask) for number, block in enumerate(blocks))
        if not others:
            return self._down[0].add_to(residual, first)
        out = self._down[0](first)
        for number, activated in enumerate(others, start=1):
            out = self._down[number].add_to(out, activated)
        return out.add_(residual)

    def _activate(self, number: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """silu(gate x) * up x in one block, [rows, block width]; the activation and the product ride on the two
        matrix products, which is 5-10 % of an FFN at up to 32 rows."""
        gate = self._gate[number]
        prepared = gate.prepare(x)
        out = self._up[number].times(gate.silu(prepared), prepared).to(x.dtype)
        return out if mask is None else out.mul_(mask)


_ALL = slice(None)


def _maker(weight: Tensor, *, pack: bool, int8: bool) -> Callable[[slice, slice, Tensor | None], Linear]:
    """What makes a product of some rows and columns of `weight`, with a bias for these rows."""
    if not int8:
        return lambda rows, columns, bias: Linear(
            weight[rows] if columns == _ALL else weight[:, columns].clone(), bias, pack=pack
        )
    values, scale = quantize(weight, "int8")
    return lambda rows, columns, bias: Int8Linear(values[rows, columns], scale[rows], bias)


def reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, widths: Sequence[int]) -> Tensor:
    """The formula in float64, each row with the first `widths[row]` neurons, [rows, hidden]."""
    rows = []
    for row, width in enumerate(widths):
        one = x[row].double()
        inner = F.silu(gate[:width].double() @ one) * (up[:width].double() @ one)
        rows.append(down[:, :width].double() @ inner)
    return torch.stack(rows)
