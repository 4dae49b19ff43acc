"""Plain products, norms and the most probable tokens on the interpreter, against float64, between margins of NaN."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import linear as linears
from sortserve.kernels.gpu import norm, sampling
from tests.kernels.closeness import Seeded, tolerance, worst_row_error
from tests.kernels.gpu.guarded import Guarded

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
EPS = 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_plain_weights(bias: bool, residual: bool) -> None:
    seeded = Seeded(5)
    x, weight = seeded.normal(5, 24), seeded.normal(9, 24)
    extra = (seeded.normal(9) if bias else None, seeded.normal(5, 9) if residual else None)
    expected = linears.reference(x, weight, None, *extra)
    allowed = tolerance(torch.float32, roundings=3, terms=24)
    out = torch.empty(5, 9)
    for target in (None, out):
        made = linears.linear(x, weight, extra[0], residual=extra[1], out=target)
        assert worst_row_error(made, expected) <= allowed
    assert worst_row_error(out, expected) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_between_margins(dtype: torch.dtype) -> None:
    seeded = Seeded(rows := 7)
    size, picked = 72, seeded.ints(0, rows, 3)
    shapes = [(rows, size), (rows, size), (size,)]
    guards = [Guarded.of(seeded.normal(*shape, dtype=dtype)) for shape in shapes]
    x, residual, weight = (guard.tensor for guard in guards)
    outs = [Guarded(shape, dtype) for shape in [(rows, size)] * 3 + [(3, size)]]
    plain, summed, total, gathered = (guard.tensor for guard in outs)
    norm.rms_norm(x, weight, EPS, out=plain)
    norm.add_rms_norm(x, residual, weight, EPS, out=(summed, total))
    norm.gather_norm(x, torch.tensor(picked), weight, EPS, out=gathered)
    assert all(guard.untouched() for guard in (*guards, *outs))
    allowed = tolerance(dtype, roundings=1, terms=size)
    assert torch.equal(total, x + residual)
    assert worst_row_error(plain, norm.reference(x, weight, EPS)) <= allowed
    assert worst_row_error(summed, norm.reference(total, weight, EPS)) <= allowed
    assert worst_row_error(gathered, norm.reference(x[picked], weight, EPS)) <= allowed
    assert worst_row_error(summed, norm.reference(x, weight, EPS)) > 4 * allowed
    assert worst_row_error(plain, norm.reference(x, weight, 0.1)) > 4 * allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (3, 1024), (5, 1025), (1, 5000)])
def test_most_probable(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Ids and values are exact, also among ties; the log-probability sums `vocab` exponentials in float32."""
    seeded = Seeded(vocab)
    logits = (seeded.normal(rows, vocab, scale=3.0) * 8).round().div(8).to(dtype)  # many ties
    logits[0, -1] = 40.0  # the last of the vocabulary: what an off-by-one mask loses
    guard = Guarded.of(logits)
    values, ids, logprobs = sampling.reference(logits, k := min(5, vocab))
    best, told = sampling.argmax(guard.tensor)
    found, places = sampling.top_k(guard.tensor, k)
    assert guard.untouched()
    assert best.tolist() == ids[:, 0].tolist()
    assert int(best[0]) == vocab - 1
    assert torch.equal(found.double(), values)
    assert torch.equal(places, ids)
    allowed = tolerance(torch.float32, roundings=4, terms=vocab) * 50  # absolute: |logit| is up to 50
    assert (told.double() - logprobs).abs().max() <= allowed
    without = logits.double()[:, :-1].logsumexp(-1)
    assert (logits.double().logsumexp(-1) - without).abs().max() > 4 * allowed


def test_an_id_is_always_of_the_vocabulary() -> None:
    logits = torch.full((2, 1030), float("nan"))
    logits[1] = float("-inf")
    ids, _ = sampling.argmax(logits)
    assert ids.tolist() == [0, 0]
    assert sampling.top_k(logits, 3)[1].tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: sampling.top_k(torch.zeros(2, 9), 10), "k is 10, expected 1 to 9"),
        (lambda: sampling.argmax(torch.zeros(9)), "expected \\[rows, vocab\\]"),
        (lambda: norm.rms_norm(torch.zeros(2, 8), torch.zeros(7), EPS), "weight"),
        (lambda: norm.gather_norm(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32), torch.zeros(8), EPS), "int64"),
        (lambda: norm.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), EPS), "residual"),
        (lambda: linears.linear(torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.int8)), "no scale"),
        (lambda: linears.linear(torch.zeros(2, 8), torch.zeros(4, 9)), "x is"),
    ],
    ids=["k", "flat", "norm-weight", "index", "residual", "scale", "sizes"],
)
def test_refuses(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
