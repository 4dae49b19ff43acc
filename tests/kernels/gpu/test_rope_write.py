"""QK-norm, rotation and page write against the float64 formula; all of the pool but the rows' places stays as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import rope_write
from sortserve.kernels.gpu.rope_write import reference, rope_and_write
from tests.kernels.closeness import Seeded, tolerance, worst_row_error
from tests.kernels.gpu.guarded import Guarded
from tests.kernels.gpu.interpreter import round_fp8_rightly

PAGE_LAYERS, SIZE, LAYER, MAX_LEN = 3, 16, 1, 200


class Case:
    """Random rows, each with a token slot of its own; with `gaps` every fifth is padding and every fourth writes nothing.
    Many rows have few heads: the interpreter takes a millisecond and more for each."""

    def __init__(self, rows: int, head_dim: int, dtype: torch.dtype, *, norm: bool = False, gaps: bool = False) -> None:
        seeded = Seeded(rows * head_dim)
        self.dtype, self.head_dim = dtype, head_dim
        self.heads, self.kv_heads = (6, 2) if rows < 10 else (2, 1)
        self.qkv = seeded.normal(rows, (self.heads + 2 * self.kv_heads) * head_dim, dtype=dtype)
        angles = seeded.normal(MAX_LEN, head_dim // 2, scale=3.0)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.tensor(seeded.ints(0, MAX_LEN, rows), dtype=torch.int32)
        self.pages = rows // SIZE + 2
        places = torch.tensor(seeded.permutation(self.pages * SIZE)[:rows])
        self.slots = places // SIZE * (2 * PAGE_LAYERS * SIZE) + places % SIZE
        if gaps:
            self.slots[::4] = -1
            self.positions[::5] = -1
        self.norms = [seeded.normal(head_dim, dtype=dtype) if norm else None for _ in range(2)]

    def run(self, pool: Tensor, out: Tensor | None = None, **changed: Any) -> Tensor:
        arguments: dict[str, Any] = {"positions": self.positions, "slots": self.slots, "layer_in_page": LAYER} | changed
        return rope_and_write(
            Guarded.of(self.qkv).tensor,
            Guarded.of(self.cos).tensor,
            Guarded.of(self.sin).tensor,
            arguments.pop("positions"),
            arguments.pop("slots"),
            pool,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            page_layers=PAGE_LAYERS,
            query_norm=self.norms[0],
            key_norm=self.norms[1],
            out=out,
            **arguments,
        )

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference(
            self.qkv,
            self.cos,
            self.sin,
            self.positions.clamp_min(0),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            query_norm=self.norms[0],
            key_norm=self.norms[1],
        )

    def pool(self, dtype: torch.dtype | None = None) -> Guarded:
        return Guarded((self.pages * 2 * PAGE_LAYERS, SIZE, self.kv_heads * self.head_dim), dtype or self.dtype)

    def written(self, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that write, and what is in their places: K and V [rows that write, kv_heads, head_dim]."""
        rows = torch.nonzero((self.slots >= 0) & (self.positions >= 0))[:, 0]
        tokens = pool.view(-1, self.kv_heads, self.head_dim)
        key = self.slots[rows] + LAYER * SIZE
        return rows, tokens[key], tokens[key + PAGE_LAYERS * SIZE]

    def allowed(self) -> float:
        """The result is rounded once; the mean of squares, the norm and the rotation are in float32."""
        return tolerance(self.dtype, roundings=1, terms=self.head_dim)


MIXES = [
    pytest.param(rows, norm, dtype, id=f"rows{rows}-{'qk-norm' if norm else 'plain'}-{str(dtype)[6:]}")
    for rows in (1, 7, 33, 129)
    for norm in (False, True)
    for dtype in (torch.float32, torch.float16)
    if rows < 129 or (norm and dtype == torch.float16)  # 129 rows take the interpreter three seconds: one of the four
]


@pytest.mark.parametrize(("rows", "norm", "dtype"), MIXES)
def test_rows(rows: int, norm: bool, dtype: torch.dtype) -> None:
    case = Case(rows, 32, dtype, norm=norm, gaps=rows > 1)
    pool, out = case.pool(), Guarded((rows, case.heads, 32), dtype)
    query = case.run(pool.tensor, out.tensor)
    assert query is out.tensor
    assert out.untouched()
    assert pool.untouched()
    expected_query, expected_key, expected_value = case.expected()
    active = case.positions >= 0
    assert worst_row_error(query[active], expected_query[active]) <= case.allowed()
    assert (query[~active] == 0).all()
    writers, keys, values = case.written(pool.tensor)
    assert worst_row_error(keys, expected_key[writers]) <= case.allowed()
    assert torch.equal(values.double(), expected_value[writers])  # V is only copied
    assert int(pool.tensor.isfinite().sum()) == 2 * len(writers) * case.kv_heads * 32  # all else is still NaN


@pytest.mark.parametrize("head_dim", [pytest.param(size, id=f"dim{size}") for size in (64, 80, 128, 256)])
def test_head_sizes(head_dim: int) -> None:
    case = Case(3, head_dim, torch.float32, norm=True)
    pool = case.pool()
    query = case.run(pool.tensor)
    expected_query, expected_key, expected_value = case.expected()
    writers, keys, values = case.written(pool.tensor)
    assert worst_row_error(query, expected_query) <= case.allowed()
    assert worst_row_error(keys, expected_key[writers]) <= case.allowed()
    assert torch.equal(values.double(), expected_value[writers])


def test_fp8_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """e4m3 has three bits after the point, so a value is off by at most 2^-4 of itself, or of the smallest normal number,
    2^-6. What is out of range (448) takes the largest value, not NaN."""
    round_fp8_rightly(monkeypatch)
    case = Case(7, 32, torch.float32)
    case.qkv[0, -1] = 1e4
    case.qkv[1, -1] = -1e4
    pool = case.pool(torch.float8_e4m3fn)
    case.run(pool.tensor, key_scale=0.25, value_scale=2.0)
    assert pool.untouched()
    writers, keys, values = case.written(pool.tensor)
    _, expected_key, expected_value = case.expected()
    wide = values.double() * 2.0
    assert wide[0, -1, -1] == 896
    assert wide[1, -1, -1] == -896
    wide[:2, -1, -1] = expected_value[writers][:2, -1, -1]
    for got, expected, scale in (
        (keys.double() * 0.25, expected_key[writers], 0.25),
        (wide, expected_value[writers], 2.0),
    ):
        assert ((got - expected).abs() <= 2.0**-4 * expected.abs().clamp_min(2.0**-6 * scale)).all()


BUGS = ("next-position", "next-slot", "other-layer", "no-norm", "norms-swapped", "halves", "not-turned")


@pytest.mark.parametrize("bug", BUGS)
def test_the_tolerance_finds(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(7, 32, torch.float16, norm=True)
    pool, (expected_query, expected_key, _) = case.pool(), case.expected()
    pool.tensor.zero_()
    changed: dict[str, Any] = {}
    if bug == "next-position":
        changed["positions"] = (case.positions + 1) % MAX_LEN
    elif bug == "next-slot":
        changed["slots"] = case.slots + 1
    elif bug == "other-layer":
        changed["layer_in_page"] = LAYER + 1
    elif bug == "no-norm":
        case.norms = [None, None]
    elif bug == "norms-swapped":
        case.norms.reverse()
    elif bug == "halves":  # Hugging Face's order of a head
        halves = case.qkv.view(7, -1, 16, 2).transpose(2, 3)
        case.qkv = halves.reshape(case.qkv.shape)
    else:
        case.cos, case.sin = torch.ones_like(case.cos), torch.zeros_like(case.sin)
    query = case.run(pool.tensor, **changed)
    writers, keys, _ = case.written(pool.tensor)
    errors = (worst_row_error(query, expected_query), worst_row_error(keys, expected_key[writers]))
    assert max(errors) > 4 * case.allowed()


def test_a_strided_input_is_read_in_place() -> None:
    case = Case(5, 32, torch.float32)
    expected, plain = case.pool(), case.run(case.pool().tensor)
    case.run(expected.tensor)
    wide = torch.full((5, case.qkv.shape[1] + 8), float("nan"))
    wide[:, : case.qkv.shape[1]] = case.qkv
    pool = case.pool()
    query = rope_and_write(
        wide[:, : case.qkv.shape[1]],
        case.cos,
        case.sin,
        case.positions,
        case.slots,
        pool.tensor,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        page_layers=PAGE_LAYERS,
        layer_in_page=LAYER,
    )
    assert torch.equal(query, plain)
    assert torch.equal(pool.tensor.nan_to_num(9.0), expected.tensor.nan_to_num(9.0))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, "slots"),
        ({"layer_in_page": 3}, "layer 3 of 3"),
        ({"key_scale": 0.5}, "float8"),
        ({"out": torch.zeros(3, 6, 31)}, "out"),
        ({"query_norm": torch.ones(32)}, "both weights"),
    ],
    ids=["positions", "slots", "layer", "scale", "out", "norm"],
)
def test_refuses(changed: dict[str, object], told: str) -> None:
    case = Case(3, 32, torch.float32)
    arguments: dict[str, object] = {
        "qkv": case.qkv,
        "cos": case.cos,
        "sin": case.sin,
        "positions": case.positions,
        "slots": case.slots,
        "pool": case.pool().tensor,
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "page_layers": PAGE_LAYERS,
        "layer_in_page": LAYER,
    }
    with pytest.raises(ValueError, match=told):
        rope_write.rope_and_write(**(arguments | changed))  # type: ignore[arg-type]
