"""The loss of several exits under one head, in chunks, with its gradient worked out in the same sweep.

    loss = sum_e scale[e] * mean_t( (1 - a_e) * CE(logits_et, target_t) + a_e * KL(full_t || exit_et) )
    a_e  = distill for all exits but the full model's own, 0 for that one

(Sorted LLaMA / SoFT: the mean of the exits' cross-entropies, one shared head; the KL term is self-distillation, whose
teacher gets no gradient from it.) The logits of a 150k vocabulary do not fit: 4,096 tokens and 6 exits of them are 15 GB in
float32. So a chunk of tokens at a time goes through the head, its gradient with respect to hidden states and head is taken
at once, d logits = scale * (softmax - (1 - a) onehot - a * softmax_full), and the logits are forgotten: three products an
exit, as in an ordinary step, and CHUNK_BYTES of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
"""Of float32 logits of one exit; two or three of that size live at once."""


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """`total` is what to differentiate; `each` [exits] the exits' mean cross-entropies in nats, detached."""

    total: Tensor
    each: Tensor


def head_loss(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Sequence[float],
    distill: float = 0.0,
    teacher: Tensor | None = None,
) -> HeadLoss:
    """`states` [exits, tokens, hidden] are normed; `weight` [vocab, hidden]; `targets` [tokens]; `scale` one per exit.

    `teacher` [tokens, hidden]: normed states of the full model, needed if `distill` is over 0 and the last exit is not
    the full model's; without it the last exit is the teacher.
    """
    assert states.dim() == 3
    assert len(scale) == len(states)
    total, each = _ChunkedHead.apply(states, weight, targets, tuple(scale), distill, teacher)  # type: ignore[no-untyped-call]
    return HeadLoss(total, each)


def chunk_rows(vocab: int) -> int:
    """Tokens of a chunk."""
    return max(16, CHUNK_BYTES // (4 * vocab))


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: tuple[float, ...],
        distill: float,
        teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        num_exits, num_tokens, _ = states.shape
        need_states, need_weight = ctx.needs_input_grad[:2]
        d_states = torch.empty_like(states) if need_states else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        # sums stay on the device: reading one out would wait for it at every chunk
        each = torch.zeros(num_exits, dtype=torch.float64, device=states.device)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        rows = chunk_rows(len(weight))
        own_teacher = teacher is None
        for start in range(0, num_tokens, rows):
            part = slice(start, start + rows)
            likely = None
            for e in reversed(range(num_exits)):  # the last first: it may be the teacher of the others
                is_teacher = own_teacher and e == num_exits - 1
                if distill and likely is None and not is_teacher:
                    assert teacher is not None
                    likely = (teacher[part].detach() @ weight.detach().T).float().softmax(-1)
                share = 0.0 if is_teacher else distill
                entropy, loss, gradient = _one(states[e, part].detach(), weight.detach(), targets[part], share, likely)
                if distill and is_teacher and num_exits > 1:
                    likely = gradient.clone()
                each[e] += entropy
                total += scale[e] * loss
                if need_states or need_weight:
                    gradient[torch.arange(len(gradient), device=gradient.device), targets[part]] -= 1.0 - share
                    if share:
                        assert likely is not None
                        gradient.sub_(likely, alpha=share)
                    small = gradient.mul_(scale[e] / num_tokens).to(states.dtype)
                    if d_states is not None:
                        torch.mm(small, weight.detach(), out=d_states[e, part])
                    if d_weight is not None:
                        d_weight += small.T @ states[e, part].detach()
        ctx.save_for_backward(d_states, None if d_weight is None else d_weight.to(weight.dtype))
        each_mean = (each / num_tokens).to(torch.float32)
        ctx.mark_non_differentiable(each_mean)
        return (total / num_tokens).to(torch.float32), each_mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_states, d_weight = ctx.saved_tensors
        factor = gradients[0]
        if float(factor) != 1.0:
            d_states = None if d_states is None else d_states * factor.to(d_states.dtype)
            d_weight = None if d_weight is None else d_weight * factor.to(d_weight.dtype)
        return d_states, d_weight, None, None, None, None


def _one(
    states: Tensor, weight: Tensor, targets: Tensor, share: float, likely: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy and loss in nats, and the softmax, of a chunk. `share` of the loss is KL(likely || softmax)."""
    logits = (states @ weight.T).float()
    log_sum = logits.logsumexp(-1)
    entropy = (log_sum - logits.gather(1, targets[:, None])[:, 0]).sum(dtype=torch.float64)
    loss = (1 - share) * entropy
    if share:
        assert likely is not None
        own = torch.special.entr(likely).sum(dtype=torch.float64)
        cross = log_sum.sum(dtype=torch.float64) - torch.dot(likely.flatten(), logits.flatten())
        loss = loss + share * (cross - own)
    return entropy, loss, logits.sub_(log_sum[:, None]).exp_()
