"""The most probable tokens of a row without a softmax in memory.

Pass 1, one program per row and block of the vocabulary: the block's largest logits, their places, and the block's
(maximum, sum of exponentials). Pass 2 merges the blocks' few survivors. Logits are read once and nothing of the
vocabulary's size is written. Ties go to the lower id, as torch.argmax on the CPU.

Bytes: rows * vocab * 4. FLOPs: an exponential a logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sortserve.kernels.gpu.checks import expect

BLOCK = 1024
MOST_K = 64


@triton.jit
def block_top_kernel(logits_ptr, value_ptr, id_ptr, stats_ptr, vocab, blocks, K: tl.constexpr, BLOCK: tl.constexpr):
    """The K largest of one block, largest first, and (maximum, sum of exp(logit - maximum))."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    cell = row * blocks + block
    peak = tl.max(logits, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(stats_ptr + 2 * cell, peak)
    tl.store(stats_ptr + 2 * cell + 1, tl.sum(tl.exp(logits - safe), 0))
    left = ids < vocab
    for place in range(K):
        rest = tl.where(left, logits, float("-inf"))
        top = tl.max(rest, 0)
        winner = tl.min(tl.where(left & (rest == top), ids, vocab), 0)
        tl.store(value_ptr + cell * K + place, top)
        tl.store(id_ptr + cell * K + place, winner)
        left = left & (ids != winner)


def _survivors(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    expect("logits", logits, (rows, vocab), logits)
    blocks = triton.cdiv(vocab, BLOCK)
    values = logits.new_empty((rows, blocks * k), dtype=torch.float32)
    ids = torch.empty((rows, blocks * k), dtype=torch.int32, device=logits.device)
    stats = logits.new_empty((rows, blocks, 2), dtype=torch.float32)
    if rows:
        block_top_kernel[(rows, blocks)](logits, values, ids, stats, vocab, blocks, k, BLOCK, num_warps=4)
    return values, ids, stats


def log_sum(stats: Tensor) -> Tensor:
    """log of the sum of exponentials of each row, from the blocks' (maximum, sum), [rows]."""
    return (stats[..., 0] + stats[..., 1].log()).logsumexp(-1)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [rows, vocab] -> (ids int64 [rows], their log-probabilities float32 [rows]). Raises ValueError."""
    values, ids, stats = _survivors(logits, 1)
    best = values.max(-1, keepdim=True)
    # the first block that has the maximum: its id is the lowest
    place = (values == best.values).to(torch.int32).argmax(-1, keepdim=True)
    return ids.gather(1, place)[:, 0].long(), best.values[:, 0] - log_sum(stats)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, largest first: values float32 and ids int64, [rows, k]. Raises ValueError."""
    if not 1 <= k <= min(MOST_K, logits.shape[1]):
        raise ValueError(f"k is {k}, expected 1 to {min(MOST_K, logits.shape[1])}")
    values, ids, _ = _survivors(logits, min(k, BLOCK))
    # ids ascend from block to block, and a stable sort keeps that order among ties
    found = torch.sort(values, dim=-1, descending=True, stable=True)
    return found.values[:, :k], ids.gather(1, found.indices[:, :k]).long()


def reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`argmax` in float64."""
    wide = logits.double().log_softmax(-1)
    ids = wide.argmax(-1)
    return ids, wide.gather(1, ids[:, None])[:, 0]
