"""Paged attention against the float64 formula on plain keys and values, for mixes of decode rows and prompt chunks.

The pool is full of random numbers, so whoever reads a page or a place that is not his own gets something else.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sortserve.kernels.attention import AttentionRows, attend, causal_mask, reference, write
from tests.kernels.closeness import DTYPES, Seeded, tolerance, worst_row_error

SIZE, PAGE_LAYERS, CELL_PAGES = 16, 3, 2
LAYERS = PAGE_LAYERS * CELL_PAGES
HEADS = [pytest.param(q, kv, id=f"{q}on{kv}") for q, kv in ((4, 4), (6, 2), (7, 1))]
HEAD_DIM = 10

Run = tuple[int, int]  # rows at positions [start, stop) of a sequence of its own


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

    def rows(self, writes: Tensor | None = None) -> AttentionRows:
        positions = torch.cat([torch.arange(start, stop) for start, stop in self.runs])
        sequences = torch.tensor([place for place, (start, stop) in enumerate(self.runs) for _ in range(start, stop)])
        tables = torch.zeros(CELL_PAGES, len(self.runs), max(len(pages) for pages in self.pages), dtype=torch.long)
        for place, pages in enumerate(self.pages):
            tables[:, place, : len(pages)] = pages.T * (2 * PAGE_LAYERS)
        return AttentionRows(positions, sequences, writes, tables.unbind(), SIZE, PAGE_LAYERS, self.window, self.dtype)

    def run(self, layer: int, rows: AttentionRows | None = None) -> Tensor:
        return attend(self.query, self.pool, rows or self.rows(), layer, self.num_kv_heads)

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
    hidden = causal_mask(torch.tensor([[1, 2], [3, 4]]), 5, torch.float32, window=2)[:, 0].isinf().int()
    assert hidden.tolist() == [[[0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]]


@pytest.mark.parametrize("name", ["decode-mixed", "chunk-at-271", "decode-and-chunks"])
def test_some_rows(name: str) -> None:
    """Those that go on after a segment's last K and V, from every sequence that has them, or only from one."""
    case = Case(MIXES[name], 6, 2, torch.float32)
    expected = case.expected(1)
    for chosen in (torch.arange(1, len(expected)), torch.tensor([2])):
        out = attend(case.query[chosen], case.pool, case.rows().only(chosen), 1, 2)
        assert worst_row_error(out, expected[chosen]) <= case.allowed()


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("name", ["decode-mixed", "decode-and-chunks"])
def test_what_is_written(name: str, some: bool) -> None:
    """K and V go where attention finds them, of the rows that write, and nothing else changes."""
    case = Case(MIXES[name], 6, 2, torch.float32)
    num_rows = len(case.query)
    writes = torch.arange(num_rows) % 3 > 0 if some else torch.ones(num_rows, dtype=torch.bool)
    key, value = Seeded(1).normal(2, num_rows, 2, HEAD_DIM)
    expected, layer, row = case.pool.clone(), PAGE_LAYERS + 1, 0
    for place, (start, stop) in enumerate(case.runs):
        for position in range(start, stop):
            first = case.pages[place][position // SIZE, 1] * 2 * PAGE_LAYERS + 1
            if writes[row]:
                expected[first, position % SIZE] = key[row].flatten()
                expected[first + PAGE_LAYERS, position % SIZE] = value[row].flatten()
            row += 1
    write(key, value, case.pool, case.rows(writes if some else None), layer)
    assert torch.equal(case.pool, expected)


BUGS = ("no-mask", "sees-the-next", "misses-itself", "stale-page", "wrong-layer", "keys-for-values", "rows-swapped")


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", ["decode-mixed", "chunk-at-271"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_finds(dtype: torch.dtype, name: str, bug: str) -> None:
    """The real kernel, told something wrong about its rows. At 300 tokens one token too many is 6 % of a row."""
    case = Case(MIXES[name], 6, 2, dtype)
    rows, expected, layer = case.rows(), case.expected(1), 1
    if bug == "no-mask":
        rows = replace(rows, positions=torch.full_like(rows.positions, rows.tables[0].shape[1] * SIZE - 1))
    elif bug in ("sees-the-next", "misses-itself"):
        step = 1 if bug == "sees-the-next" else -1
        # a row that sees nothing at all would be NaN, so the first position stays as it is
        rows = replace(rows, positions=(rows.positions + step).clamp_min(0))
    elif bug == "stale-page":
        tables = [table.clone() for table in rows.tables]
        tables[0][0, 3] = tables[0][0, 4]  # the fourth block reads the fifth's page
        rows = replace(rows, tables=tuple(tables))
    elif bug == "wrong-layer":
        layer = 2
    elif bug == "keys-for-values":
        case.pool = case.pool.view(-1, 2, PAGE_LAYERS, *case.pool.shape[1:]).flip(1).flatten(0, 2)
    else:
        case.query = case.query.roll(1, 0)
    assert worst_row_error(case.run(layer, rows), expected) > 2 * case.allowed()
