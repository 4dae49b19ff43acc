"""The rotation of pairs against the float64 rotation of halves, which is how Hugging Face models store heads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sortserve.kernels.rope import pair_rows, reference, rotate
from tests.kernels.closeness import DTYPES, ROWS, Seeded, tolerance, worst_row_error


def paired(x: Tensor) -> Tensor:
    """[rows, heads, head_dim] from halves to pairs, by the function that reorders weights."""
    return pair_rows(x.flatten(1).T, x.shape[2]).T.reshape(x.shape).contiguous()


def case(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in halves, and angles [rows, head_dim / 2] of positions up to 30,000."""
    seeded = Seeded(rows * 100 + head_dim)
    positions = torch.tensor(seeded.ints(0, 30_000, rows))
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return seeded.normal(rows, heads, head_dim, dtype=dtype), positions[:, None] * frequencies


def rotation(angles: Tensor) -> Tensor:
    return torch.complex(angles.cos(), angles.sin())[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [pytest.param(h, d, id=f"{h}x{d}") for h, d in ((1, 2), (3, 6), (14, 64))]
)
@pytest.mark.parametrize("rows", ROWS)
def test_rotation(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Sine, cosine, their two products and the sum round in float32, the result once more in its own dtype."""
    x, angles = case(rows, heads, head_dim, dtype)
    out = rotate(paired(x), rotation(angles))
    assert out.dtype == dtype
    expected = paired(reference(x, angles))
    assert worst_row_error(out, expected) <= tolerance(dtype, roundings=1, terms=4)


def test_pairing_is_a_permutation_within_heads() -> None:
    """Weights and biases alike; Q.K needs no more than that both are reordered the same way."""
    names = torch.arange(12)
    assert pair_rows(names, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = torch.stack([names, names + 100], dim=1)
    assert pair_rows(matrix, 6)[:, 0].tolist() == pair_rows(names, 6).tolist()
    assert pair_rows(matrix, 6)[:, 1].tolist() == (pair_rows(names, 6) + 100).tolist()


def test_scores_depend_on_the_distance_only() -> None:
    """What rotary embedding is for: q at 7 against k at 3 is q at 107 against k at 103."""
    seeded = Seeded(3)
    query, key = seeded.normal(1, 2, 8), seeded.normal(1, 2, 8)
    frequencies = 100.0 ** -(torch.arange(0, 8, 2) / 8)

    def score(q_at: int, k_at: int) -> Tensor:
        turned = [rotate(paired(x), rotation(at * frequencies[None])) for x, at in ((query, q_at), (key, k_at))]
        return (turned[0] * turned[1]).sum(-1)

    assert torch.allclose(score(7, 3), score(107, 103), atol=1e-4)
    assert not torch.allclose(score(7, 3), score(107, 104), atol=1e-2)


def next_position(x: Tensor, angles: Tensor) -> Tensor:
    frequencies = 10_000.0 ** -(torch.arange(0, x.shape[2], 2) / x.shape[2])
    return paired(reference(x, angles + frequencies))


def other_way(x: Tensor, angles: Tensor) -> Tensor:
    return paired(reference(x, -angles))


def unpaired(x: Tensor, angles: Tensor) -> Tensor:
    return rotate(x, rotation(angles))


def stale_angle(x: Tensor, angles: Tensor) -> Tensor:
    return paired(reference(x, torch.cat([angles[:-1], angles[:1]])))


@pytest.mark.parametrize("bug", [next_position, other_way, unpaired, stale_angle], ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_finds(dtype: torch.dtype, bug: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, angles = case(33, 14, 64, dtype)
    error = worst_row_error(bug(x, angles), paired(reference(x, angles)))
    assert error > 2 * tolerance(dtype, roundings=1, terms=4)
