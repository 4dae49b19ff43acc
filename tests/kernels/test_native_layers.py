"""Layers in one call against the float64 formulas: odd sizes, pages in no order, rows that skip or run narrow FFNs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sortserve.kernels import attention, linear, norm
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
    pool: Tensor
    blocks: list[Tensor]
    widths: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    attends: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    window: int | None

    def run(self, rows: slice = slice(None)) -> Tensor:
        settings = self.made.settings(self.widths[:, rows], self.attends[:, rows])
        blocks = [one[:, rows].contiguous() for one in self.blocks]
        return self.made.run(FIRST, self.hidden[rows], self.positions[rows].contiguous(), self.pool, blocks, settings)

    def slots(self, row: int, layer: int, count: int) -> list[tuple[int, int, int]]:
        """(pool row of K, that of V, place there) of a row's first tokens."""
        table = self.blocks[layer // PAGE_LAYERS][:, row] + layer % PAGE_LAYERS
        return [(int(table[0, t // BLOCK]), int(table[1, t // BLOCK]), t % BLOCK) for t in range(count)]

    def expected(self) -> Tensor:
        """The formula over the pool as it is; what the rows write is kept aside."""
        return torch.stack([self._one(row) for row in range(len(self.hidden))])

    def _one(self, row: int) -> Tensor:
        x, position = self.hidden[row].double(), int(self.positions[row])
        angle = self.rotations[position, 0].to(torch.complex128).angle()
        turned = torch.polar(torch.ones_like(angle), angle)
        for number in range(LAYERS):
            layer = self.layers[FIRST + number]
            normed = norm.reference(x, layer.input_norm.weight, EPS)[None]
            heads = linear.reference(normed, layer.known["qkv"], layer.bias)[0].view(-1, SIZE)
            query, key, value = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS])
            if layer.query_norm is not None and layer.key_norm is not None:
                query = norm.reference(query, layer.query_norm.weight, EPS)
                key = norm.reference(key, layer.key_norm.weight, EPS)
            query, key = (
                torch.view_as_real(torch.view_as_complex(one.reshape(-1, SIZE // 2, 2)) * turned).flatten(1)
                for one in (query, key)
            )
            if self.attends[number, row]:
                begin = 0 if self.window is None else max(0, position + 1 - self.window)
                slots = self.slots(row, number, position)[begin:]
                keys, values = (
                    torch.stack(
                        [*(self.pool[slot[which], slot[2]].view(KV_HEADS, SIZE).double() for slot in slots), own]
                    )
                    for which, own in ((0, key), (1, value))
                )
                x = x + layer.known["output"].double() @ attention.reference(query, keys, values).flatten()
            normed = norm.reference(x, layer.post_norm.weight, EPS)[None]
            gate, up, down = (layer.known[name] for name in ("gate", "up", "down"))
            x = x + ffn_reference(normed, gate, up, down, [int(self.widths[number, row])])[0]
        return x


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


def make_case(native: Native, kind: Kind, rows: int, *, qk_norm: bool = False, window: int | None = None) -> Case:
    if not native.multiplies(kind[0], int8=kind[1]):
        pytest.skip("not on this processor")
    seeded = Seeded(rows)
    layers = [make_layer(native, seeded, kind, qk_norm=qk_norm) for _ in range(FIRST + LAYERS)]
    turns = seeded.normal(CONTEXT, 1, SIZE // 2, scale=3.0)
    rotations = torch.polar(torch.ones_like(turns), turns)
    shape = LayersShape(HEADS, KV_HEADS, SIZE, BLOCK, PAGE_LAYERS, window)
    each, pages = -(-CONTEXT // BLOCK), LAYERS // PAGE_LAYERS
    pool = seeded.normal(rows * each * pages * 2 * PAGE_LAYERS, BLOCK, KV_HEADS * SIZE, dtype=kind[0])
    order = torch.tensor(seeded.permutation(rows * each * pages)).view(pages, rows, each) * (2 * PAGE_LAYERS)
    widths = np.array(seeded.ints(0, WIDTH + 1, LAYERS * rows)).reshape(LAYERS, rows)
    widths[1, : rows // 2] = 0
    widths[2] = WIDTH
    attends = np.array(seeded.ints(0, 4, LAYERS * rows)).reshape(LAYERS, rows) > 0
    attends[:, 0] = True
    positions = torch.tensor([CONTEXT - 1, 0, BLOCK - 1, BLOCK, 16, 15, *seeded.ints(0, CONTEXT, rows)][:rows])
    return Case(
        layers,
        NativeLayers(layers, shape, rotations),
        rotations,
        seeded.normal(rows, HIDDEN, dtype=kind[0]),
        positions,
        pool,
        [torch.stack([one, one + PAGE_LAYERS]) for one in order],
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
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(native: Native, kind: Kind, rows: int, window: int | None, qk_norm: bool) -> None:
    """The answer, what is written, and that nothing else is."""
    case = make_case(native, kind, rows, qk_norm=qk_norm, window=window)
    before, hidden, expected = case.pool.clone(), case.hidden.clone(), case.expected()
    out = case.run()
    assert worst_row_error(out, expected) <= limit(kind)
    assert torch.equal(case.hidden, hidden)
    written = torch.zeros(case.pool.shape[:2], dtype=torch.bool)
    for row in range(rows):
        for number in range(LAYERS):
            key, value, place = case.slots(row, number, int(case.positions[row]) + 1)[-1]
            written[key, place] = written[value, place] = True
    assert torch.equal(before[~written], case.pool[~written])
    assert (before[written] != case.pool[written]).any(1).all()
    if rows > 1:  # a token later, over what was written: keys and values are those of the formula
        case.positions = (case.positions + 1).clamp_max(CONTEXT - 1)
        assert worst_row_error(case.run(), case.expected()) <= limit(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_bits_in_every_batch(native: Native, kind: Kind) -> None:
    case = make_case(native, kind, 14)
    case.hidden[3] *= 1e4
    together = case.run()
    for row in range(14):
        assert torch.equal(case.run(slice(row, row + 1))[0], together[row])


def later(case: Case) -> Case:
    return replace(case, positions=case.positions - (case.positions > 0).long())


def stale_page(case: Case) -> Case:
    blocks = [one.clone() for one in case.blocks]
    blocks[1][:, 0, 0] = blocks[1][:, 1, 0]
    return replace(case, blocks=blocks)


def other_layer(case: Case) -> Case:
    return replace(case, blocks=case.blocks[::-1])


def without_attention(case: Case) -> Case:
    return replace(case, attends=np.roll(case.attends, 1, axis=1))


def other_widths(case: Case) -> Case:
    return replace(case, widths=np.roll(case.widths, 1, axis=1))


@pytest.mark.parametrize(
    "bug", [later, stale_page, other_layer, without_attention, other_widths], ids=lambda bug: str(bug.__name__)
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tolerance_finds(native: Native, kind: Kind, bug: Callable[[Case], Case]) -> None:
    """The real layers, told something wrong of one row, page or layer."""
    case = make_case(native, kind, 7)
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
        {"blocks": case.blocks[:1]},
        {"blocks": [one.int() for one in case.blocks]},
        {"widths": case.widths + WIDTH},
        {"attends": 2 * case.attends},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            replace(case, **change).run()
