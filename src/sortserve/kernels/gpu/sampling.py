"""The most probable tokens of a row without a softmax in memory.

Pass 1, one program per row and block of the vocabulary: the block's largest logits, largest first, their places, and the
block's maximum and sum of exponentials. Pass 2, one program per row, merges the blocks: each step takes the best of the
blocks' heads and moves that block to its next. Logits are read once and nothing of the vocabulary's size is written.

    argmax_i l_i,  log p_i = l_i - max_j l_j - log sum_j exp(l_j - max_j l_j)

Ties go to the lower id, as torch.argmax on the CPU. NaN counts as -inf, so that an id is always one of the vocabulary.

Bytes: rows * vocab * itemsize. FLOPs: an exponential a logit. Two launches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect

BLOCK = 1024
MOST_K = 64


@triton.jit
def block_top_kernel(
    logits_ptr: "Any",
    value_ptr: "Any",
    id_ptr: "Any",
    sum_ptr: "Any",
    vocab: "Any",
    blocks: "Any",
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The K largest of one block, largest first (-inf and the id `vocab` where it has fewer), and sum exp(l - maximum)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    left = ids < vocab
    logits = tl.load(logits_ptr + row * vocab + ids, mask=left, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("-inf"))
    cell = row * blocks + block
    peak = tl.max(logits, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(sum_ptr + cell, tl.sum(tl.exp(logits - safe), 0))
    for place in range(K):
        top = tl.max(tl.where(left, logits, float("-inf")), 0)
        winner = tl.min(tl.where(left & (logits == top), ids, vocab), 0)
        tl.store(value_ptr + cell * K + place, top)
        tl.store(id_ptr + cell * K + place, winner)
        left = left & (ids != winner)


@triton.jit
def merge_kernel(
    value_ptr: "Any",
    id_ptr: "Any",
    sum_ptr: "Any",
    out_value_ptr: "Any",
    out_id_ptr: "Any",
    logprob_ptr: "Any",
    vocab: "Any",
    blocks: "Any",
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """The K largest of all blocks, largest first, and the log-probability of the first."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    ok = block < blocks
    cells = row * blocks + block
    heads = tl.load(value_ptr + cells * K, mask=ok, other=float("-inf"))
    ids = tl.load(id_ptr + cells * K, mask=ok, other=vocab)
    peak = tl.max(heads, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    sums = tl.load(sum_ptr + cells, mask=ok, other=0.0)
    total = tl.sum(sums * tl.exp(heads - safe), 0)
    total = tl.where(peak == float("-inf"), 1.0, total)  # a row without any number: log-probability -inf
    tl.store(logprob_ptr + row, peak - safe - tl.log(total))
    taken = tl.zeros((BLOCKS,), tl.int32)
    for place in range(K):
        top = tl.max(heads, 0)
        winner = tl.min(tl.where(heads == top, ids, vocab), 0)
        tl.store(out_value_ptr + row * K + place, top)
        tl.store(out_id_ptr + row * K + place, winner.to(tl.int64))
        won = ok & (ids == winner)
        taken += won.to(tl.int32)
        more = won & (taken < K)
        heads = tl.where(won, tl.load(value_ptr + cells * K + taken, mask=more, other=float("-inf")), heads)
        ids = tl.where(won, tl.load(id_ptr + cells * K + taken, mask=more, other=vocab), ids)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values [rows, k], ids [rows, k], log-probability of the first [rows])."""
    if logits.dim() != 2:
        raise ValueError(f"logits are {tuple(logits.shape)}, expected [rows, vocab]")
    rows, vocab = logits.shape
    expect("logits", logits, (rows, vocab), logits)
    if not 1 <= k <= min(MOST_K, vocab):
        raise ValueError(f"k is {k}, expected 1 to {min(MOST_K, vocab)}")
    blocks = triton.cdiv(vocab, BLOCK)
    made = [
        logits.new_empty(shape, dtype=torch.float32)
        for shape in ((rows, blocks, k), (rows, blocks), (rows, k), (rows,))
    ]
    block_values, sums, values, logprobs = made
    block_ids = logits.new_empty((rows, blocks, k), dtype=torch.int32)
    ids = logits.new_empty((rows, k), dtype=torch.int64)
    if rows:
        block_top_kernel[(rows, blocks)](logits, block_values, block_ids, sums, vocab, blocks, k, BLOCK, num_warps=4)
        wide = triton.next_power_of_2(blocks)
        merge_kernel[(rows,)](
            block_values, block_ids, sums, values, ids, logprobs, vocab, blocks, k, wide, num_warps=4 if wide > 64 else 1
        )  # fmt: skip
    return values, ids, logprobs


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [rows, vocab] -> (ids int64 [rows], their log-probabilities float32 [rows]). Raises ValueError."""
    _, ids, logprobs = _top(logits, 1)
    return ids[:, 0], logprobs


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, largest first: (values float32, ids int64), both [rows, k]. Raises ValueError."""
    values, ids, _ = _top(logits, k)
    return values, ids


def reference(logits: Tensor, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Values, ids and the log-probability of the first, in float64; ties go to the lower id."""
    wide = logits.double()
    order = wide.sort(dim=-1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k], wide.log_softmax(-1).amax(-1)
