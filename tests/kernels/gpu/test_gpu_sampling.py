"""argmax, its log-probability and top-k over a vocabulary in blocks, against PyTorch over all of it."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from sortserve.kernels.gpu import sampling
from sortserve.kernels.gpu.sampling import argmax, reference, top_k
from tests.kernels.closeness import Seeded
from tests.kernels.gpu.guarded import Guarded

VOCABS = [pytest.param(size, id=f"vocab{size}") for size in (5, 1024, 2500)]
ROWS = [pytest.param(rows, id=f"rows{rows}") for rows in (1, 7)]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", ROWS)
def test_argmax(rows: int, vocab: int) -> None:
    logits = Guarded.of(Seeded(rows + vocab).normal(rows, vocab, scale=4.0)).tensor
    ids, logprobs = argmax(logits)
    _, expected_ids, expected = reference(logits)
    assert torch.equal(ids, expected_ids[:, 0])
    assert torch.allclose(logprobs.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab", VOCABS)
def test_top_k(vocab: int) -> None:
    logits = Guarded.of(Seeded(vocab).normal(3, vocab)).tensor
    for k in (1, 5):
        values, ids = top_k(logits, k)
        expected = logits.topk(k)
        assert torch.equal(values, expected.values)
        assert torch.equal(logits.gather(1, ids), values)
        assert torch.equal(ids, expected.indices), "no ties among random logits"


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


def test_a_block_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a vocabulary cut short by one token."""
    logits = torch.zeros(1, 2500)
    logits[0, -1] = 9.0
    assert int(argmax(logits)[0]) == 2499
    assert int(argmax(logits[:, :-1].contiguous())[0]) != 2499
    assert sampling.BLOCK < 2500


def test_what_does_not_fit_is_refused() -> None:
    for k in (0, 6, sampling.MOST_K + 1):
        with pytest.raises(ValueError, match=f"k is {k}"):
            top_k(torch.zeros(1, 5), k)
    with pytest.raises(ValueError, match="not contiguous"):
        argmax(torch.zeros(5, 3).T)
