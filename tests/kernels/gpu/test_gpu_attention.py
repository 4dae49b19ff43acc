"""Paged attention in the interpreter against the float64 formula: decode, chunks, refills, mixes and padding rows.

Everything that must not be read is NaN: other layers, other sequences' pages, places of a page past the context or before
the window, the queries of padding rows, and what lies around each tensor. A NaN that is read shows in the result.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import attention_chunk, attention_decode
from sortserve.kernels.gpu.attention import AttentionScratch, rows_per_tile
from sortserve.kernels.gpu.attention_decode import SplitPlan
from sortserve.kernels.gpu.paged import softmax_step
from tests.kernels.closeness import Seeded, tolerance, worst_row_error
from tests.kernels.gpu.paged_case import Case, Run, decode, ints

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
PADDING: Run = (-1, 0)


def allowed(dtype: torch.dtype, context: int = 300) -> float:
    """The scores, which go into an exponent, the weights and the result may round; sums are in float32."""
    return tolerance(dtype, roundings=3, terms=context)


def worst(out: Tensor, expected: Tensor) -> float:
    """Of the rows that attend; the others must be zeros."""
    active = expected.abs().sum(1) > 0
    assert (out[~active] == 0).all()
    return worst_row_error(out[active], expected[active])


def in_half(cases: dict[str, list[Run]], *names: str) -> list[Any]:
    """All cases in float32, those named in float16 too."""
    single = [pytest.param(name, torch.float32, id=name) for name in cases]
    return single + [pytest.param(name, torch.float16, id=f"{name}-float16") for name in names]


CONTEXTS = {
    "one-token": decode(1),
    "page": decode(16),
    "page-and-one": decode(17),
    "1000": decode(1000),
    "mixed": [*decode(70, 1), PADDING, *decode(17, 16, 5), PADDING],
    "mostly-padding": [*decode(1), PADDING, PADDING],
}


@pytest.mark.parametrize(("name", "dtype"), in_half(CONTEXTS, "1000", "mixed"))
def test_decode(name: str, dtype: torch.dtype) -> None:
    case = Case(CONTEXTS[name], dtype=dtype, spare=2)
    assert worst(case.run(), case.expected()) <= allowed(dtype, 1000)


@pytest.mark.parametrize("rows", [pytest.param(rows, id=f"rows{rows}") for rows in (7, 33, 129)])
def test_rows_of_decode(rows: int) -> None:
    contexts = Seeded(rows).ints(1, 60, rows)
    case = Case(decode(*contexts), heads=3, kv_heads=1)
    assert worst(case.run(), case.expected()) <= allowed(torch.float32)


SHAPES = [
    pytest.param({"heads": 4, "kv_heads": 4}, id="4on4"),
    pytest.param({"heads": 7, "kv_heads": 1}, id="7on1"),
    pytest.param({"heads": 20, "kv_heads": 1}, id="20on1"),
    pytest.param({"head_dim": 64, "size": 32}, id="dim64-page32"),
    pytest.param({"head_dim": 80, "size": 64}, id="dim80-page64"),
    pytest.param({"head_dim": 128, "size": 64}, id="dim128-page64"),
    pytest.param({"head_dim": 256}, id="dim256"),
]


@pytest.mark.parametrize("tile", [pytest.param(1, id="decode"), pytest.param(3, id="chunk")])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: dict[str, int], tile: int) -> None:
    runs = decode(100, 33) if tile == 1 else [(65, 69), *decode(17)]
    case = Case(runs, tile=tile, **shape)  # type: ignore[arg-type]
    assert worst(case.run(), case.expected()) <= allowed(torch.float32)


CHUNKS = {
    "prompt7": [(0, 7)],
    "prompt33": [(0, 33)],
    "prompt129": [(0, 129)],
    "refill-at-16": [(16, 49)],
    "chunk-at-271": [(271, 300)],
    "decode-and-chunks": [*decode(17), (5, 12), PADDING, *decode(300), (0, 33), *decode(1)],
}


@pytest.mark.parametrize(("name", "dtype"), in_half(CHUNKS, "prompt33", "decode-and-chunks"))
def test_chunks(name: str, dtype: torch.dtype) -> None:
    tile = rows_per_tile(6, 2, 32) // 2 if name == "prompt129" else 8
    case = Case(CHUNKS[name], heads=6, dtype=dtype, tile=tile, spare=1)
    assert worst(case.run(), case.expected()) <= allowed(dtype)


@pytest.mark.parametrize("window", [pytest.param(window, id=f"window{window}") for window in (1, 16, 150)])
def test_sliding_window(window: int) -> None:
    runs = [*decode(300, 1), (60, 77), (0, 9)]
    mixed = Case(runs, tile=8, window=window)
    assert worst(mixed.run(), mixed.expected()) <= allowed(torch.float32)
    alone = Case(decode(300, 17), window=window)
    assert worst(alone.run(), alone.expected()) <= allowed(torch.float32)


def test_soft_cap_and_scale() -> None:
    for runs, tile in ((decode(40, 3), 1), ([(20, 40)], 8)):
        case = Case(runs, tile=tile, head_dim=64)
        options: dict[str, Any] = {"softcap": 1.5, "scale": 0.3}
        expected = case.expected(**options)
        assert worst(case.run(**options), expected) <= allowed(torch.float32)
        assert worst(case.run(scale=0.3), expected) > 100 * allowed(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_pool(dtype: torch.dtype) -> None:
    """The products see the stored numbers exactly, so the tolerance is that of the queries' dtype."""
    for runs, tile in ((decode(40, 3), 1), ([(20, 40)], 8)):
        case = Case(runs, tile=tile, dtype=dtype, pool_dtype=torch.float8_e4m3fn)
        scales: dict[str, Any] = {"key_scale": 0.5, "value_scale": 3.0}
        assert worst(case.run(**scales), case.expected(**scales)) <= allowed(dtype)


def test_one_graph_serves_every_context() -> None:
    """Grids and splits come from sizes alone: the same call answers for other positions, and batch-mates, that leave or
    come, change no bit of a row."""
    case = Case(decode(200, 40, 7))
    together = case.run()
    for alone in range(3):
        positions = ints([-1] * 3)
        positions[alone] = case.batch.row_position[alone]
        out = case.run(batch=dataclasses.replace(case.batch, row_position=positions))
        assert torch.equal(out[alone], together[alone])
        assert out.abs().sum(1).count_nonzero() == 1
    shorter = dataclasses.replace(case.batch, row_position=ints([99, 12, 0]))
    out, case.batch = case.run(batch=shorter), shorter
    assert worst(out, case.expected()) <= allowed(torch.float32)


def test_rows_whose_attention_is_skipped_read_nothing() -> None:
    """Their positions are -1, in tiles of one row and of several: zeros, whatever their queries are."""
    case = Case([*decode(40), (16, 24), (30, 37), *decode(9)], tile=8)
    positions, query = case.batch.row_position.clone(), case.query
    positions[0] = -1
    positions[1:9] = -1
    query[:9] = float("nan")
    case.batch = dataclasses.replace(case.batch, row_position=positions)
    out = case.run()
    assert (out[:9] == 0).all()
    assert worst(out, case.expected()) <= allowed(torch.float32)


def test_scratch() -> None:
    case = Case(decode(500, 40))
    scratch = AttentionScratch.allocate(torch.device("cpu"), 4, 4, 2, 32, 512)
    scratch.partial.fill_(float("nan"))
    scratch.log_sums.fill_(float("nan"))
    assert torch.equal(case.run(scratch=scratch), case.run())
    small = AttentionScratch(scratch.partial[:64], scratch.log_sums[:2])
    with pytest.raises(ValueError, match="scratch holds 2 partial results"):
        case.run(scratch=small)


@pytest.mark.parametrize(
    ("rows", "context", "expected"),
    [
        (1, 64, SplitPlan(1, 64)),
        (1, 100_000, SplitPlan(64, 64)),  # 8 heads of 132 x 2 programs
        (8, 4096, SplitPlan(8, 64)),
        (64, 2048, SplitPlan(1, 512)),
        (64, 32_768, SplitPlan(16, 512)),  # one long row must not be what all wait for
    ],
)
def test_split_plan_by_hand(rows: int, context: int, expected: SplitPlan) -> None:
    assert SplitPlan.of(rows, 8, context, 132) == expected


METADATA_BUGS = ("sees-the-next", "misses-itself", "stale-page", "wrong-layer", "rows-swapped", "other-sequence")


@pytest.mark.parametrize("bug", METADATA_BUGS)
@pytest.mark.parametrize("tile", [pytest.param(1, id="decode"), pytest.param(8, id="chunk")])
def test_the_tolerance_finds_wrong_metadata(tile: int, bug: str) -> None:
    """Told something wrong about its rows, over a pool full of numbers. At 300 tokens one too many is 6 % of a row."""
    runs = decode(299, 150) if tile == 1 else [(292, 299), (147, 150)]
    case = Case(runs, dtype=torch.float16, tile=tile, poisoned=False)
    changed: dict[str, Any] = {}
    positions, tables = case.batch.row_position, case.batch.tables.clone()
    if bug in ("sees-the-next", "misses-itself"):
        step = 1 if bug == "sees-the-next" else -1
        changed["batch"] = dataclasses.replace(case.batch, row_position=positions + step)
    elif bug == "stale-page":
        tables[:, 3] = tables[:, 4]
        changed["batch"] = dataclasses.replace(case.batch, tables=tables)
    elif bug == "other-sequence":
        changed["batch"] = dataclasses.replace(case.batch, tables=tables.flip(0))
    elif bug == "wrong-layer":
        changed["layer_in_page"] = 2
    else:
        expected = case.expected()
        case.query = case.query.roll(1, 0)
        assert worst(case.run(), expected) > 4 * allowed(torch.float16)
        return
    assert worst(case.run(**changed), case.expected()) > 4 * allowed(torch.float16)


def test_the_tolerance_finds_a_missing_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([(280, 299)], dtype=torch.float16, tile=8, poisoned=False)
    monkeypatch.setattr(attention_chunk, "softmax_step", lambda *arguments: softmax_step(*arguments[:-1], False))
    assert worst(case.run(), case.expected()) > 4 * allowed(torch.float16)


def test_the_tolerance_finds_an_unweighted_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial results added as if all splits weighed the same."""
    case = Case(decode(500, 300), dtype=torch.float16)
    kernel = attention_decode._merge_kernel

    class Unweighted:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(partial: Tensor, log_sums: Tensor, *others: Any, **constants: Any) -> None:
                kernel[grid](partial, torch.zeros_like(log_sums), *others, **constants)

            return launch

    assert worst(case.run(), case.expected()) <= allowed(torch.float16)
    monkeypatch.setattr(attention_decode, "_merge_kernel", Unweighted())
    assert worst(case.run(), case.expected()) > 4 * allowed(torch.float16)


@pytest.mark.parametrize("where", ["key-past-the-context", "value-past-the-context", "before-the-window"])
def test_a_poisoned_place_that_is_read_shows(where: str) -> None:
    """The poison does what the tests above rely on: one place of a row's own context made NaN is found."""
    case = Case(decode(40), window=20)
    position = 21 if where == "before-the-window" else 39
    row = int(case.batch.tables[0, position // 16]) * 6 + 1 + (3 if where.startswith("value") else 0)
    assert case.run().isfinite().all()
    case.pool.tensor[row, position % 16, 5] = float("nan")
    assert not case.run().isfinite().all()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"layer_in_page": 3}, "layer 3 of 3"),
        ({"window": 0}, "window 0"),
        ({"softcap": -1.0}, "softcap -1.0"),
        ({"key_scale": 2.0}, "float8"),
        ({"row_position": torch.zeros(2, dtype=torch.int64)}, "row_position"),
        ({"max_context": 10_000}, "max_context 10000"),
        ({"max_tile_rows": 1000}, "tiles of 1000 rows"),
    ],
    ids=["layer", "window", "softcap", "scale", "dtype", "context", "tile"],
)
def test_refuses(changed: dict[str, Any], told: str) -> None:
    case = Case(decode(20, 30))
    fields = {field.name for field in dataclasses.fields(case.batch)}
    of_batch = {name: value for name, value in changed.items() if name in fields}
    if of_batch:
        changed = {"batch": dataclasses.replace(case.batch, **of_batch)}
    with pytest.raises(ValueError, match=told):
        case.run(**changed)
