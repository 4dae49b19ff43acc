"""Paged attention against the float64 formula on plain keys and values, for mixes of decode rows and prompt chunks.

The pool is full of random numbers, so whoever reads a page or a place that is not his own gets something else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from sortserve.kernels.attention import AttentionRows, RowGroup, attend, causal_mask, reference
from tests.kernels.closeness import DTYPES, Seeded, tolerance, worst_row_error

SIZE, PAGE_LAYERS, CELL_PAGES = 16, 3, 2
LAYERS = PAGE_LAYERS * CELL_PAGES
HEADS = [pytest.param(q, kv, id=f"{q}on{kv}") for q, kv in ((4, 4), (6, 2), (7, 1))]
HEAD_DIM = 10

Run = tuple[int, int]  # rows at positions [start, stop) of a sequence of its own


def nothing() -> None:
    """No mask."""


class Case:
    """Sequences with their K/V of every layer, scattered over the pages of one pool."""

    def __init__(
        self, runs: Sequence[Run], num_heads: int, num_kv_heads: int, dtype: torch.dtype, window: int | None = None
    ) -> None:
        seeded = Seeded(sum(stop for _, stop in runs))
        self.runs, self.dtype, self.window, self.num_kv_heads = list(runs), dtype, window, num_kv_heads
        self.query = seeded.normal(sum(stop - start for start, stop in runs), num_heads, HEAD_DIM, dtype=dtype)
        blocks = [-(-stop // SIZE) for _, stop in runs]
        free = seeded.permutation(sum(blocks) * CELL_PAGES + 3)  # three pages are nobody's
        self.pool = seeded.normal(len(free) * 2 * PAGE_LAYERS, SIZE, num_kv_heads * HEAD_DIM, scale=2.0, dtype=dtype)
        self.keys, self.values, self.pages = [], [], []
        for (_, stop), count in zip(runs, blocks, strict=True):
            pages = torch.tensor([[free.pop() for _ in range(CELL_PAGES)] for _ in range(count)])  # [blocks, pages]
            both = seeded.normal(2, LAYERS, stop, num_kv_heads, HEAD_DIM, dtype=dtype)
            for layer in range(LAYERS):
                column, inside = divmod(layer, PAGE_LAYERS)
                for which in range(2):
                    for position in range(stop):
                        row = pages[position // SIZE, column] * 2 * PAGE_LAYERS + which * PAGE_LAYERS + inside
                        self.pool[row, position % SIZE] = both[which, layer, position].flatten()
            self.keys.append(both[0])
            self.values.append(both[1])
            self.pages.append(pages)

    def rows(self) -> AttentionRows:
        """Grouped as the kernel asks for: single rows together, padded, each longer run alone."""
        firsts = [0]
        for start, stop in self.runs:
            firsts.append(firsts[-1] + stop - start)
        num_rows, groups = firsts[-1], []
        single = [place for place, (start, stop) in enumerate(self.runs) if stop - start == 1]
        if single:
            longest = max(len(self.pages[place]) for place in single)
            padded = torch.zeros(len(single), longest, CELL_PAGES, dtype=torch.long)
            for row, place in enumerate(single):
                padded[row, : len(self.pages[place])] = self.pages[place]
            starts = [self.runs[place][0] for place in single]
            mask: Callable[[], Tensor | None] = nothing
            if self.window is not None or min(starts) < longest * SIZE - 1:
                mask = partial(causal_mask, starts, 1, longest * SIZE, self.dtype, self.window)
            rows = None if len(single) == num_rows else torch.tensor([firsts[place] for place in single])
            groups.append(RowGroup(len(single), 1, rows, _blocks(padded), mask))
        for place, (start, stop) in enumerate(self.runs):
            if stop - start > 1:
                context = len(self.pages[place]) * SIZE
                mask = partial(causal_mask, [start], stop - start, context, self.dtype, self.window)
                all_rows = slice(firsts[place], firsts[place + 1])
                alone = stop - start == num_rows
                groups.append(
                    RowGroup(1, stop - start, None if alone else all_rows, _blocks(self.pages[place][None]), mask)
                )
        return AttentionRows(num_rows, tuple(groups))

    def run(self, layer: int, rows: AttentionRows | None = None) -> Tensor:
        return attend(self.query, self.pool, rows or self.rows(), *divmod(layer, PAGE_LAYERS), self.num_kv_heads)

    def expected(self, layer: int) -> Tensor:
        out, row = [], 0
        for place, (start, stop) in enumerate(self.runs):
            for position in range(start, stop):
                first = 0 if self.window is None else max(0, position + 1 - self.window)
                seen = slice(first, position + 1)
                keys, values = self.keys[place][layer, seen], self.values[place][layer, seen]
                out.append(reference(self.query[row], keys, values).flatten())
                row += 1
        return torch.stack(out)

    def allowed(self) -> float:
        """The scores, which are up to about 4 here and go into an exponent, the weights and the result may round."""
        return tolerance(self.dtype, roundings=3, terms=300)


def _blocks(pages: Tensor) -> tuple[Tensor, ...]:
    """pages [sequences, blocks, cell pages] -> pool rows of K and V per page of the cell."""
    rows = pages * (2 * PAGE_LAYERS)
    return tuple(torch.stack([rows[:, :, c], rows[:, :, c] + PAGE_LAYERS]) for c in range(CELL_PAGES))


def decode(*contexts: int) -> list[Run]:
    return [(context - 1, context) for context in contexts]


MIXES = {
    "decode1": decode(1),
    "decode5": decode(5),
    "decode16": decode(16),
    "decode17": decode(17),
    "decode300": decode(300),
    "decode-mixed": decode(300, 1, 17, 16, 5),
    "prompt7": [(0, 7)],
    "prompt33": [(0, 33)],
    "prompt129": [(0, 129)],
    "chunk-at-16": [(16, 49)],
    "chunk-at-271": [(271, 300)],
    "decode-and-chunks": [(16, 17), (5, 12), (299, 300), (0, 33), (0, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("runs", MIXES.values(), ids=MIXES.keys())
def test_attention(runs: list[Run], heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    case = Case(runs, heads, kv_heads, dtype)
    for layer in (0, PAGE_LAYERS - 1, LAYERS - 1):
        out = case.run(layer)
        assert out.dtype == dtype
        assert worst_row_error(out, case.expected(layer)) <= case.allowed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [pytest.param(window, id=f"window{window}") for window in (1, 7, 16, 40)])
@pytest.mark.parametrize("name", ["decode300", "decode-mixed", "prompt33", "chunk-at-271", "decode-and-chunks"])
def test_sliding_window(name: str, window: int, dtype: torch.dtype) -> None:
    case = Case(MIXES[name], 6, 2, dtype, window)
    assert worst_row_error(case.run(1), case.expected(1)) <= case.allowed()


def test_mask_by_hand() -> None:
    hidden = causal_mask([1, 3], 2, 5, torch.float32, window=2)[:, 0].isinf().int()
    assert hidden.tolist() == [[[0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]]


BUGS = ("no-mask", "sees-the-next", "misses-itself", "stale-page", "wrong-layer", "keys-for-values", "rows-swapped")


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", ["decode-mixed", "chunk-at-271"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_finds(dtype: torch.dtype, name: str, bug: str) -> None:
    """The real kernel, told something wrong about its rows. At 300 tokens one token too many is 6 % of a row."""
    case = Case(MIXES[name], 6, 2, dtype)
    rows, expected = case.rows(), case.expected(1)
    group = rows.groups[0]
    assert group.mask is not None
    context = group.mask.shape[-1]
    layer, starts = 1, [start for start, _ in case.runs]
    if bug == "no-mask":
        group = dataclasses.replace(group, make_mask=nothing)
    elif bug in ("sees-the-next", "misses-itself"):
        step = 1 if bug == "sees-the-next" else -1
        # a row that sees nothing at all would be NaN, so the first position stays as it is
        shifted = [max(0, start + step) for start in starts]
        mask = partial(causal_mask, shifted, group.rows_each, context, dtype)
        group = dataclasses.replace(group, make_mask=mask)
    elif bug == "stale-page":
        blocks = [block.clone() for block in group.blocks]
        blocks[0][:, 0, 3] = blocks[0][:, 0, 4]  # the fourth block reads the fifth's page
        group = dataclasses.replace(group, blocks=tuple(blocks))
    elif bug == "wrong-layer":
        layer = 2
    elif bug == "keys-for-values":
        group = dataclasses.replace(group, blocks=tuple(block.flip(0) for block in group.blocks))
    else:
        case.query = case.query.roll(1, 0)
    out = case.run(layer, AttentionRows(rows.num_rows, (group,)))
    assert worst_row_error(out, expected) > 2 * case.allowed()
