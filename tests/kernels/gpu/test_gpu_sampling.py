"""argmax, its log-probability and top-k over a vocabulary in blocks, against PyTorch over all of it."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import sampling
from sortserve.kernels.gpu.sampling import argmax, reference, top_k
from tests.kernels.closeness import Seeded, tolerance
from tests.kernels.gpu.guarded import Guarded

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (3, 1024), (5, 1025), (1, 5000)])
def test_most_probable(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Ids and values are exact, also among ties; the log-probability sums `vocab` exponentials in float32."""
    seeded = Seeded(vocab)
    logits = (seeded.normal(rows, vocab, scale=3.0) * 8).round().div(8).to(dtype)  # many ties
    logits[0, -1] = 40.0  # the last of the vocabulary: what an off-by-one mask loses
    guard = Guarded.of(logits)
    values, ids, logprobs = reference(logits, k := min(5, vocab))
    best, told = argmax(guard.tensor)
    found, places = top_k(guard.tensor, k)
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
    ids, _ = argmax(logits)
    assert ids.tolist() == [0, 0]
    assert top_k(logits, 3)[1].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_ties_go_to_the_lower_id() -> None:
    """In one block, and in two."""
    logits = torch.zeros(2, 2500)
    logits[0, [7, 40]] = 3.0
    logits[1, [1500, 2400]] = 3.0
    assert argmax(logits)[0].tolist() == [7, 1500]
    assert top_k(logits, 3)[1].tolist() == [[7, 40, 0], [1500, 2400, 0]]


def test_what_may_not_be_drawn() -> None:
    """Logits of minus infinity, whole blocks of them too."""
    logits = torch.full((1, 2500), float("-inf"))
    logits[0, 2000] = -5.0
    ids, logprobs = argmax(logits)
    assert (int(ids), float(logprobs)) == (2000, 0.0)


def test_what_does_not_fit_is_refused() -> None:
    for k in (0, 6, sampling.MOST_K + 1):
        with pytest.raises(ValueError, match=f"k is {k}"):
            top_k(torch.zeros(1, 5), k)
    with pytest.raises(ValueError, match="not contiguous"):
        argmax(torch.zeros(5, 3).T)
    with pytest.raises(ValueError, match=r"expected \[rows, vocab\]"):
        argmax(torch.zeros(9))
