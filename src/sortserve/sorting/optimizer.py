"""Float32 weights behind those that are computed with, AdamW or Muon on them, and the schedule of their rates.

Contract: `collect` adds a pass's gradients to the float32 ones, so that many passes of bfloat16 add up without loss;
`step` clips, updates the float32 weights and writes them back. `state` and `restore` are all that an update depends on.
Weights in bfloat16 with a float32 copy, not autocast: a step of the bundled model on 2 cores took 0.9 s against 1.6 s and
more, because the residual stream and all that is element-wise stays in bfloat16 too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sortserve.engine.errors import SortingError
from sortserve.sorting.recipe import Train


class Optimizer:
    """Of the named parameters that are trained."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], train: Train) -> None:
        self._train = train
        self._names = [name for name, _ in named]
        self._used = [parameter for _, parameter in named]
        # a float32 parameter is its own master
        self._masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self._used]
        muon = [p for n, p in zip(self._names, self._masters, strict=True) if _is_matrix_of_a_layer(n, p)]
        muon = muon if train.optimizer == "muon" else []
        rest = [p for p in self._masters if all(p is not one for one in muon)]
        decayed = {"params": [p for p in rest if p.dim() > 1], "weight_decay": train.weight_decay}
        plain = {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW([decayed, plain], lr=train.lr, betas=(0.9, train.beta2), fused=True), train.lr)
        ]
        if muon:
            made = torch.optim.Muon(muon, lr=train.muon_lr, weight_decay=train.weight_decay)
            self._optimizers.append((made, train.muon_lr))

    @property
    def num_parameters(self) -> int:
        """How many weights are trained."""
        return sum(p.numel() for p in self._masters)

    def collect(self) -> None:
        """Add the gradients of the pass that just ran backward."""
        for used, master in zip(self._used, self._masters, strict=True):
            if used is master or used.grad is None:
                continue
            if master.grad is None:
                master.grad = used.grad.float()
            else:
                master.grad += used.grad
            used.grad = None

    def step(self, factor: float, passes: int) -> float:
        """One update at `factor` times the peak rates, of the mean over `passes`. Returns the gradient's norm."""
        gradients = [p.grad for p in self._masters if p.grad is not None]
        torch._foreach_div_(gradients, float(passes))
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._train.clip))
        if not math.isfinite(norm):
            raise SortingError(f"the gradient's norm is {norm}: lower the rate; what was saved before is whole")
        for optimizer, peak in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for used, master in zip(self._used, self._masters, strict=True):
                if used is not master:
                    used.copy_(master)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Float32 weights and moments by name."""
        found: dict[str, Tensor] = {}
        for name, master in zip(self._names, self._masters, strict=True):
            found[f"weight/{name}"] = master.detach()
            for optimizer, _ in self._optimizers:
                for key, value in optimizer.state.get(master, {}).items():
                    found[f"{key}/{name}"] = value
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave. Raises SortingError if it is of other weights."""
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self._names}
        for full_name, value in state.items():
            key, _, name = full_name.partition("/")
            by_name.setdefault(name, {})[key] = value
        for name, used, master in zip(self._names, self._used, self._masters, strict=True):
            kept = by_name.pop(name)
            if "weight" not in kept or kept["weight"].shape != master.shape:
                raise SortingError(f"the unfinished run has no weight {name} of shape {list(master.shape)}")
            with torch.no_grad():
                master.copy_(kept.pop("weight"))
                used.copy_(master)
            for optimizer, _ in self._optimizers:
                if any(p is master for group in optimizer.param_groups for p in group["params"]) and kept:
                    optimizer.state[master] = {key: value.to(_home(key, master)) for key, value in kept.items()}
        if by_name:
            raise SortingError(f"the unfinished run trains {sorted(by_name)[0]}, this one does not")


def _home(key: str, master: Tensor) -> Any:
    return master.device if key != "step" or master.is_cuda else "cpu"


def _is_matrix_of_a_layer(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and "layers." in name


def rate_at(progress: float, train: Train) -> float:
    """Share of the peak rate at `progress` in [0, 1] of the run: linear warm-up, then down to `final_lr`."""
    if progress < train.warmup:
        return (progress + 1e-3) / (train.warmup + 1e-3)
    if train.schedule == "linear":
        left = min(1.0, (1 - min(1.0, progress)) / max(1e-9, 1 - train.decay_from))
    else:
        done = min(1.0, (progress - train.warmup) / max(1e-9, 1 - train.warmup))
        left = 0.5 * (1 + math.cos(math.pi * done))
    return train.final_lr + (1 - train.final_lr) * left
