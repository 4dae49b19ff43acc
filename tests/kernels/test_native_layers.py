"""Layers in one call against the float64 formulas: odd sizes, pages in no order, rows that skip or run narrow FFNs, alone
in their sequence or several of one, some of them over K and V that are there already."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sortserve.kernels import attention, linear, norm
from sortserve.kernels.attention import AttentionRows
from sortserve.kernels.ffn import reference as ffn_reference
from sortserve.kernels.native import Native, NativeFfn, NativeLinear
from sortserve.kernels.native_layers import LayersShape, NativeLayers
from sortserve.kernels.norm import RmsNorm
from sortserve.kernels.quantization import dequantize, quantize
from tests.kernels.closeness import KINDS, UNIT_ROUNDOFF, Kind, Seeded, worst_row_error

HIDDEN, WIDTH, HEADS, KV_HEADS, SIZE = 45, 97, 6, 2, 20
BLOCK, PAGE_LAYERS, CONTEXT, EPS = 3, 2, 41, 1e-6
LAYERS, FIRST = 4, 1  # of five in all


@dataclass
class Layer:
    """A layer as the engine has it, and the matrices that its products stand for."""

    input_norm: RmsNorm
    qkv: NativeLinear
    output: NativeLinear
    post_norm: RmsNorm
    ffn: NativeFfn
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    known: dict[str, Tensor]
    bias: Tensor


@dataclass
class Case:
    """Rows with contexts of their own, before the layers run."""

    layers: list[Layer]
    made: NativeLayers
    rotations: Tensor
    hidden: Tensor
    positions: Tensor
    sequences: Tensor
    writes: Tensor | None
    pool: Tensor
    tables: tuple[Tensor, ...]
    widths: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    attends: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    window: int | None

    def run(self, rows: slice = slice(None)) -> Tensor:
        settings = self.made.settings(self.widths[:, rows], self.attends[:, rows])
        places = AttentionRows(
            self.positions[rows].contiguous(),
            self.sequences[rows].contiguous(),
            None if self.writes is None else self.writes[rows].contiguous(),
            self.tables,
            BLOCK,
            PAGE_LAYERS,
            self.window,
            self.pool.dtype,
        )
        return self.made.run(FIRST, self.hidden[rows], places, self.pool, settings)

    def slots(self, row: int, layer: int, count: int) -> list[tuple[int, int, int]]:
        """(pool row of K, that of V, place there) of the first tokens of a row's sequence."""
        table = self.tables[layer // PAGE_LAYERS][self.sequences[row]] + layer % PAGE_LAYERS
        return [(int(table[t // BLOCK]), int(table[t // BLOCK]) + PAGE_LAYERS, t % BLOCK) for t in range(count)]

    def expected(self) -> Tensor:
        """The formula over the pool as it is; what the rows write is kept aside."""
        x = self.hidden.double()
        for number in range(LAYERS):
            layer = self.layers[FIRST + number]
            normed = norm.reference(x, layer.input_norm.weight, EPS)
            heads = linear.reference(normed, layer.known["qkv"], layer.bias).view(len(x), -1, SIZE)
            query, key, value = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS], 1)
            if layer.query_norm is not None and layer.key_norm is not None:
                query = norm.reference(query, layer.query_norm.weight, EPS)
                key = norm.reference(key, layer.key_norm.weight, EPS)
            query, key = (self._turned(one) for one in (query, key))
            both = [self._seen(row, number, key, value) for row in range(len(x))]
            attended = torch.stack([attention.reference(query[row], *both[row]).flatten() for row in range(len(x))])
            x = x + attended @ layer.known["output"].double().T * torch.tensor(self.attends[number])[:, None]
            normed = norm.reference(x, layer.post_norm.weight, EPS)
            gate, up, down = (layer.known[name] for name in ("gate", "up", "down"))
            x = x + ffn_reference(normed, gate, up, down, self.widths[number].tolist())
        return x

    def _turned(self, x: Tensor) -> Tensor:
        angle = self.rotations[self.positions].to(torch.complex128).angle()  # [rows, 1, pairs]
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(-2)

    def _seen(self, row: int, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """K and V that a row sees: its own and those of the step's other rows of its sequence, else the pool's."""
        end = int(self.positions[row]) + 1
        own = {
            int(self.positions[other]): other
            for other in range(len(key))
            if self.sequences[other] == self.sequences[row] and (self.writes is None or self.writes[other])
        }
        seen = list(enumerate(self.slots(row, layer, end)))[0 if self.window is None else max(0, end - self.window) :]
        keys, values = (
            torch.stack(
                [
                    made[own[t]] if t in own else self.pool[slot[which], slot[2]].view(KV_HEADS, SIZE).double()
                    for t, slot in seen
                ]
            )
            for which, made in ((0, key), (1, value))
        )
        return keys, values


def make_layer(native: Native, seeded: Seeded, kind: Kind, *, qk_norm: bool) -> Layer:
    known = {}
    weights = {}
    sizes = {"qkv": ((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN), "output": (HIDDEN, HEADS * SIZE)}
    for name, (outs, ins) in (
        sizes | {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    ).items():
        weights[name] = seeded.normal(outs, ins, scale=1.5 * ins**-0.5, dtype=kind[0])
        known[name] = dequantize(*quantize(weights[name], "int8"), torch.float32) if kind[1] else weights[name]
    bias = seeded.normal(sizes["qkv"][0], scale=0.3, dtype=kind[0])

    def rms(size: int) -> RmsNorm:
        return RmsNorm((1 + seeded.normal(size, scale=0.2)).to(kind[0]), EPS)

    return Layer(
        input_norm=rms(HIDDEN),
        qkv=NativeLinear(native, weights["qkv"], bias, int8=kind[1]),
        output=NativeLinear(native, weights["output"], int8=kind[1]),
        post_norm=rms(HIDDEN),
        ffn=NativeFfn(native, weights["gate"], weights["up"], weights["down"], int8=kind[1]),
        query_norm=rms(SIZE) if qk_norm else None,
        key_norm=rms(SIZE) if qk_norm else None,
        known=known,
        bias=bias,
    )


def make_case(
    native: Native,
    kind: Kind,
    rows: int,
    *,
    qk_norm: bool = False,
    window: int | None = None,
    chunks: bool = False,
    context: int = CONTEXT,
) -> Case:
    """`chunks`: the rows are those of a few sequences, some of a single row; else each is one of its own."""
    if not native.multiplies(kind[0], int8=kind[1]):
        pytest.skip("not on this processor")
    seeded = Seeded(rows)
    layers = [make_layer(native, seeded, kind, qk_norm=qk_norm) for _ in range(FIRST + LAYERS)]
    turns = seeded.normal(context, 1, SIZE // 2, scale=3.0)
    rotations = torch.polar(torch.ones_like(turns), turns)
    shape = LayersShape(HEADS, KV_HEADS, SIZE, BLOCK, PAGE_LAYERS, window)
    positions = torch.tensor([context - 1, 0, BLOCK - 1, BLOCK, 16, 15, *seeded.ints(0, context, rows)][:rows])
    sequences, writes = torch.arange(rows), None
    if chunks:
        counts = [rows - 6, 1, 1, 4]  # of the first, long one as many as there are
        starts = [context - 1 - counts[0], 7, 0, 14]
        positions = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        sequences = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        writes = torch.arange(rows) % 5 > 1
    each, pages, number = -(-context // BLOCK), LAYERS // PAGE_LAYERS, int(sequences[-1]) + 1
    pool = seeded.normal(number * each * pages * 2 * PAGE_LAYERS, BLOCK, KV_HEADS * SIZE, dtype=kind[0])
    order = torch.tensor(seeded.permutation(number * each * pages)).view(pages, number, each) * (2 * PAGE_LAYERS)
    widths = np.array(seeded.ints(0, WIDTH + 1, LAYERS * rows)).reshape(LAYERS, rows)
    widths[1, : rows // 2] = 0
    widths[2] = WIDTH
    attends = np.array(seeded.ints(0, 4, LAYERS * rows)).reshape(LAYERS, rows) > 0
    attends[:, 0] = True
    if chunks:  # as in a segment's last layer: most rows are done once their K and V are written
        widths[-1, 2:], attends[-1, 2:] = 0, False
    return Case(
        layers,
        NativeLayers(layers, shape, rotations),
        rotations,
        seeded.normal(rows, HIDDEN, dtype=kind[0]),
        positions,
        sequences,
        writes,
        pool,
        order.unbind(),
        widths,
        attends.astype(np.int64),
        window,
    )


def limit(kind: Kind) -> float:
    """A layer rounds some ten times on its way (norms, qkv, rotation, the heads' norms, attention, both sums, what lies
    between gate and down), each independent of the others; in float32 its int8 products cut rows to 2^-24 of their largest
    value, here some 5 times the root mean square. A matrix stretches what comes in by at most 1.5."""
    return 1.5 * math.sqrt(10 * LAYERS) * UNIT_ROUNDOFF[kind[0]] * (5 if kind[0] == torch.float32 else 1)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qknorm"])
@pytest.mark.parametrize("window", [None, 7], ids=["all", "window"])
@pytest.mark.parametrize(
    ("rows", "chunks"),
    [
        pytest.param(rows, chunks, id=f"{'chunks' if chunks else 'single'}{rows}")
        for rows, chunks in ((1, False), (7, False), (33, False), (33, True))
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(native: Native, kind: Kind, rows: int, chunks: bool, window: int | None, qk_norm: bool) -> None:
    """The answer, what is written, and that nothing else is."""
    case = make_case(native, kind, rows, qk_norm=qk_norm, window=window, chunks=chunks)
    before, hidden, expected = case.pool.clone(), case.hidden.clone(), case.expected()
    out = case.run()
    assert worst_row_error(out, expected) <= limit(kind)
    assert torch.equal(case.hidden, hidden)
    written = torch.zeros(case.pool.shape[:2], dtype=torch.bool)
    for row in range(rows):
        for number in range(LAYERS):
            key, value, place = case.slots(row, number, int(case.positions[row]) + 1)[-1]
            written[key, place] = written[value, place] = case.writes is None or bool(case.writes[row])
    assert torch.equal(before[~written], case.pool[~written])
    assert (before[written] != case.pool[written]).any(1).all()
    if rows > 1:  # a token later, over what was written: keys and values are those of the formula
        case.positions = (case.positions + 1).clamp_max(CONTEXT - 1)
        assert worst_row_error(case.run(), case.expected()) <= limit(kind)


@pytest.mark.parametrize("window", [None, 7], ids=["all", "window"])
@pytest.mark.parametrize("chunks", [False, True], ids=["single", "chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_bits_in_every_batch(native: Native, kind: Kind, chunks: bool, window: int | None) -> None:
    """And in every chunk: those of a sequence one by one, in their order, over what the ones before have written."""
    case = make_case(native, kind, 14, chunks=chunks, window=window)
    case.hidden[3] *= 1e4
    before = case.pool.clone()
    together, after = case.run(), case.pool
    case.pool = before
    for row in range(14):
        assert torch.equal(case.run(slice(row, row + 1))[0], together[row])
    assert torch.equal(case.pool, after)


@pytest.mark.parametrize("window", [None, 200], ids=["all", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_contexts(native: Native, kind: Kind, window: int | None) -> None:
    """Tokens taken up block by block give what one softmax over all of them gives: 645 of them, rows of one sequence on both
    sides of a block's end."""
    case = make_case(native, kind, 14, chunks=True, window=window, context=645)
    expected = case.expected()
    assert worst_row_error(case.run(), expected) <= limit(kind)


def later(case: Case) -> Case:
    return replace(case, positions=case.positions - (case.positions > 0).long())


def stale_page(case: Case) -> Case:
    tables = [one.clone() for one in case.tables]
    tables[1][0, 0] = tables[1][1, 0]
    return replace(case, tables=tuple(tables))


def other_layer(case: Case) -> Case:
    return replace(case, tables=case.tables[::-1])


def without_attention(case: Case) -> Case:
    return replace(case, attends=np.roll(case.attends, 1, axis=1))


def other_widths(case: Case) -> Case:
    return replace(case, widths=np.roll(case.widths, 1, axis=1))


def as_if_alone(case: Case) -> Case:
    """The first rows of the chunk read another sequence's pages."""
    return replace(case, sequences=(case.sequences - 1).clamp_min(0))


def writes_all(case: Case) -> Case:
    """Rows whose K and V are there already write theirs over them."""
    return replace(case, writes=None)


def writes_later(case: Case) -> Case:
    assert case.writes is not None
    return replace(case, writes=case.writes.roll(1))


def all_go_on(case: Case) -> Case:
    """The last layer runs for all rows of the chunk."""
    widths = case.widths.copy()
    widths[-1] = WIDTH
    return replace(case, widths=widths)


ANY = [later, stale_page, other_layer, without_attention, other_widths]
OF_CHUNKS = [as_if_alone, writes_all, writes_later, all_go_on]


@pytest.mark.parametrize(
    ("bug", "chunks"),
    [
        pytest.param(bug, chunks, id=f"{bug.__name__}-{'chunks' if chunks else 'single'}")
        for chunks, bugs in ((False, ANY), (True, [*ANY, *OF_CHUNKS]))
        for bug in bugs
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tolerance_finds(native: Native, kind: Kind, bug: Callable[[Case], Case], chunks: bool) -> None:
    """The real layers, told something wrong of one row, page or layer."""
    case = make_case(native, kind, 14 if chunks else 7, chunks=chunks)
    expected, pool = case.expected(), case.pool.clone()
    assert worst_row_error(case.run(), expected) <= limit(kind)
    case.pool = pool
    assert worst_row_error(bug(case).run(), expected) > 2 * limit(kind)


def test_one_neuron_more_is_found(native: Native) -> None:
    kind = (torch.float32, True)
    case = make_case(native, kind, 7)
    case.widths = np.minimum(case.widths, WIDTH - 1)
    expected, pool = case.expected(), case.pool.clone()
    assert worst_row_error(case.run(), expected) <= limit(kind)
    wider = replace(case, widths=case.widths + (case.widths > 0), pool=pool)
    assert worst_row_error(wider.run(), expected) > 2 * limit(kind)


def test_wrong_calls_are_refused(native: Native) -> None:
    """Sizes, dtypes and places are checked before a pointer is handed over."""
    case = make_case(native, (torch.bfloat16, True), 3)
    wrong: list[dict[str, Any]] = [
        {"hidden": case.hidden[:2]},
        {"hidden": case.hidden.float()},
        {"positions": case.positions.int()},
        {"positions": torch.tensor([0, 1, CONTEXT + 1])},
        {"positions": torch.tensor([0, 1, -1])},
        {"pool": case.pool[:, :1]},
        {"pool": case.pool.float()},
        {"sequences": case.sequences.int()},
        {"sequences": torch.tensor([0, 1, 3])},
        {"writes": torch.ones(2, dtype=torch.bool)},
        {"writes": torch.ones(3)},
        {"tables": case.tables[:1]},
        {"tables": tuple(one.int() for one in case.tables)},
        {"window": 7},
        {"widths": case.widths + WIDTH},
        {"attends": 2 * case.attends},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            replace(case, **change).run()
