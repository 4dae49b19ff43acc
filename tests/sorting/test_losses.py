"""The chunked loss and its gradient against the formula, written down plainly and differentiated by autograd."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sortserve.sorting import losses
from sortserve.sorting.losses import head_loss

EXITS, TOKENS, HIDDEN, VOCAB = 3, 37, 8, 53


def naive(
    states: Tensor, weight: Tensor, targets: Tensor, scale: Sequence[float], distill: float, teacher: Tensor | None
) -> Tensor:
    """The sum over exits of the module's docstring."""
    full = (states[-1] if teacher is None else teacher).detach() @ weight.detach().T
    total = torch.zeros((), dtype=states.dtype)
    for place, (one, factor) in enumerate(zip(states, scale, strict=True)):
        logits = one @ weight.T
        share = 0.0 if teacher is None and place == len(states) - 1 else distill
        kl = F.kl_div(logits.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="batchmean")
        total = total + factor * ((1 - share) * F.cross_entropy(logits, targets) + share * kl)
    return total


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    states = torch.randn(EXITS, TOKENS, HIDDEN, generator=made, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=made, requires_grad=True)
    return states, weight, torch.randint(0, VOCAB, (TOKENS,), generator=made)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCAB * 20, 1 << 20], ids=["16 rows", "20 rows", "one chunk"])
@pytest.mark.parametrize("distill", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("given_teacher", [False, True])
def test_loss_and_gradient_are_the_naive_sum(
    chunk_bytes: int, distill: float, given_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    scale = (0.2, 0.3, 0.5)
    states, weight, targets = inputs()
    teacher = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9)) if given_teacher else None
    found = head_loss(states, weight, targets, scale, distill, teacher)
    (3 * found.total).backward()  # type: ignore[no-untyped-call]
    got = states.grad, weight.grad
    states.grad = weight.grad = None
    expected = naive(states, weight, targets, scale, distill, teacher)
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(got, (states.grad, weight.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=2e-6), (one - other).abs().max()


def test_each_exit_is_told() -> None:
    states, weight, targets = inputs()
    each = head_loss(states, weight, targets, (1.0, 0.0, 0.0), 0.5).each
    expected = [F.cross_entropy(one @ weight.T, targets).item() for one in states]
    assert each.tolist() == pytest.approx(expected, rel=1e-5)
    assert not each.requires_grad


def test_a_frozen_head_gets_no_gradient() -> None:
    states, weight, targets = inputs()
    head_loss(states, weight.detach(), targets, (1.0, 1.0, 1.0)).total.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert weight.grad is None


def test_nothing_is_differentiated_where_nothing_asks() -> None:
    states, weight, targets = inputs()
    with torch.no_grad():
        found = head_loss(states, weight, targets, (1.0, 1.0, 1.0))
    assert not found.total.requires_grad
    assert found.total.item() == pytest.approx(3 * found.each.mean().item(), rel=1e-5)


def test_bfloat16_is_near_float32() -> None:
    states, weight, targets = inputs()
    small = [tensor.detach().bfloat16().requires_grad_() for tensor in (states, weight)]
    found = head_loss(small[0], small[1], targets, (0.2, 0.3, 0.5), 0.3)
    found.total.backward()  # type: ignore[no-untyped-call]
    exact = naive(small[0].float(), small[1].float(), targets, (0.2, 0.3, 0.5), 0.3, None)
    assert found.total.item() == pytest.approx(exact.item(), rel=0.01)
    reference = torch.autograd.grad(naive(states, weight, targets, (0.2, 0.3, 0.5), 0.3, None), [states, weight])
    for one, other in zip(small, reference, strict=True):
        assert one.grad is not None
        assert torch.nn.functional.cosine_similarity(one.grad.float().flatten(), other.flatten(), dim=0) > 0.999
