"""Float32 behind bfloat16, AdamW and Muon, and a state that an update depends on and nothing else."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from sortserve.engine.errors import SortingError
from sortserve.sorting.optimizer import Optimizer, rate_at
from sortserve.sorting.recipe import Train


def parameters(dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [
        ("model.layers.0.mlp.up_proj.weight", nn.Parameter(torch.randn(6, 4).to(dtype))),
        ("model.embed_tokens.weight", nn.Parameter(torch.randn(5, 4).to(dtype))),
        ("model.norm.weight", nn.Parameter(torch.ones(4, dtype=dtype))),
    ]


def put_gradients(named: list[tuple[str, nn.Parameter]], seed: int, size: float = 1.0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = (torch.randn(parameter.shape, generator=made) * size).to(parameter.dtype)
    return [p.grad.clone() for _, p in named if p.grad is not None]


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    """A thousandth of a weight is below bfloat16's step; the float32 weights add them up."""
    named = [("w", nn.Parameter(torch.ones(8, dtype=torch.bfloat16)))]
    optimizer = Optimizer(named, Train(lr=1e-3, weight_decay=0.0))
    for _ in range(50):
        named[0][1].grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.collect()
        optimizer.step(1.0, 1)
    assert torch.allclose(named[0][1].float(), torch.full((8,), 0.95), atol=0.004)


def test_passes_add_up_in_float32() -> None:
    named = parameters(torch.bfloat16)
    optimizer = Optimizer(named, Train())
    given = [put_gradients(named, seed) for seed in range(1)]
    optimizer.collect()
    for seed in range(1, 40):
        given.append(put_gradients(named, seed, 0.001))
        optimizer.collect()
    sums = [sum(one.float() for one in of_one) for of_one in zip(*given, strict=True)]
    for master, expected in zip(optimizer._masters, sums, strict=True):
        assert master.grad is not None
        assert torch.allclose(master.grad, torch.as_tensor(expected), atol=1e-6)
    assert all(parameter.grad is None for _, parameter in named)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_alike(kind: Literal["adamw", "muon"], dtype: torch.dtype) -> None:
    train = Train(optimizer=kind, lr=0.01)
    named = parameters(dtype)
    one = Optimizer(named, train)

    def update(optimizer: Optimizer, of: list[tuple[str, nn.Parameter]], seed: int) -> None:
        put_gradients(of, seed)
        optimizer.collect()
        optimizer.step(0.5, 1)

    for seed in range(3):
        update(one, named, seed)
    kept = {name: tensor.clone() for name, tensor in one.state().items()}
    assert any(name.startswith("momentum_buffer/") for name in kept) == (kind == "muon")
    other_named = parameters(dtype)
    other = Optimizer(other_named, train)
    other.restore(kept)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, other_named, strict=True))
    for seed in range(3, 6):
        update(one, named, seed)
        update(other, other_named, seed)
    for (name, first), (_, second) in zip(named, other_named, strict=True):
        assert torch.equal(first, second), name


def test_state_of_other_weights_is_refused() -> None:
    optimizer = Optimizer(parameters(torch.float32), Train())
    state = optimizer.state()
    with pytest.raises(SortingError, match=r"no weight model\.norm\.weight"):
        optimizer.restore({name: tensor for name, tensor in state.items() if "norm" not in name})
    with pytest.raises(SortingError, match="shape"):
        optimizer.restore({**state, "weight/model.norm.weight": torch.zeros(5)})
    with pytest.raises(SortingError, match="trains other"):
        optimizer.restore({**state, "weight/other": torch.zeros(5)})


def test_a_gradient_that_is_no_number_stops_the_run() -> None:
    named = parameters(torch.float32)
    optimizer = Optimizer(named, Train())
    before = [parameter.detach().clone() for _, parameter in named]
    put_gradients(named, 0, float("inf"))
    with pytest.raises(SortingError, match="norm is"):
        optimizer.step(1.0, 1)
    assert all(torch.equal(parameter, old) for (_, parameter), old in zip(named, before, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule(schedule: Literal["cosine", "linear"]) -> None:
    train = Train(schedule=schedule, warmup=0.1, final_lr=0.05, decay_from=0.5)
    rates = [rate_at(step / 100, train) for step in range(101)]
    assert rates[0] < 0.02
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == rate_at(1.2, train) == pytest.approx(0.05)
    assert (rates[50] == 1.0) == (schedule == "linear")
