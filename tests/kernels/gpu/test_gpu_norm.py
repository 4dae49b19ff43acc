"""RMSNorm with a sum or a gather before it, against the float64 formula."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu.norm import add_rms_norm, gather_norm, reference, rms_norm
from tests.kernels.closeness import ROWS, Seeded, tolerance, worst_row_error
from tests.kernels.gpu.guarded import Guarded

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
SIZE, EPS = 45, 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, dtype: torch.dtype) -> None:
    if rows == 129 and dtype == torch.float16:
        pytest.skip("the interpreter takes five seconds for 129 rows: in one format")
    seeded = Seeded(rows)
    guards = [Guarded.of(seeded.normal(*shape, dtype=dtype)) for shape in ((rows, SIZE), (rows, SIZE), (SIZE,))]
    x, residual, weight = (guard.tensor for guard in guards)
    index = torch.tensor(seeded.ints(0, rows, 2 * rows))
    outs = [Guarded(shape, dtype) for shape in [(rows, SIZE)] * 3 + [(2 * rows, SIZE)]]
    plain, summed, total, gathered = (guard.tensor for guard in outs)
    rms_norm(x, weight, EPS, out=plain)
    add_rms_norm(x, residual, weight, EPS, out=(summed, total))
    gather_norm(x, index, weight, EPS, out=gathered)
    assert all(guard.untouched() for guard in (*guards, *outs))
    allowed = tolerance(dtype, roundings=1, terms=SIZE)
    assert worst_row_error(plain, reference(x, weight, EPS)) <= allowed
    assert torch.equal(total, x + residual)
    assert worst_row_error(summed, reference(total, weight, EPS)) <= allowed
    assert worst_row_error(summed, reference(x, weight, EPS)) > 4 * allowed
    assert torch.equal(gathered, plain[index])
    wrong = plain[index.roll(1)]  # what a planted bug would gather
    assert rows == 1 or worst_row_error(wrong, reference(x[index], weight, EPS)) > 4 * allowed


def test_a_hidden_size_of_a_real_model() -> None:
    seeded = Seeded(3)
    x, weight = seeded.normal(2, 4096), seeded.normal(4096)
    allowed = tolerance(torch.float32, roundings=1, terms=4096)
    assert worst_row_error(rms_norm(x, weight, EPS), reference(x, weight, EPS)) <= allowed


def test_eps_and_weight_count() -> None:
    seeded = Seeded(4)
    x, weight = seeded.normal(3, SIZE, scale=1e-3), seeded.normal(SIZE)
    allowed = tolerance(torch.float32, roundings=1, terms=SIZE)
    assert worst_row_error(rms_norm(x, weight, 0.0), reference(x, weight, EPS)) > 4 * allowed
    assert worst_row_error(rms_norm(x, weight.roll(1), EPS), reference(x, weight, EPS)) > 4 * allowed


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(3, SIZE)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(SIZE + 1), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, x[:2], torch.ones(SIZE), EPS)
    with pytest.raises(ValueError, match="not contiguous"):
        rms_norm(torch.ones(SIZE, 3).T, torch.ones(SIZE), EPS)
    with pytest.raises(ValueError, match="int64"):
        gather_norm(x, torch.zeros(2, dtype=torch.int32), torch.ones(SIZE), EPS)
    assert gather_norm(x, torch.zeros(0, dtype=torch.int64), torch.ones(SIZE), EPS).shape == (0, SIZE)
