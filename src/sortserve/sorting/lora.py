"""LoRA by peft, merged at the end, and its rank-sorted form (DyLoRA).

    W + (alpha / b) * B[:, :b] A[:b, :]        b = rank, or drawn for every pass from 1..rank (arXiv 2210.07558)

Contract: `add_adapters` freezes the model and gives it adapters; `merge` folds them into the weights in float32 and gives
the plain model back, with any prefix of the ranks for a rank-sorted one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sortserve.engine.errors import SortingError
from sortserve.sorting.recipe import Lora


class RankPrefix(nn.Module):
    """Keeps the first `rank` columns of every B, scaled as alpha / rank. One is shared by all adapters of a model."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.rank = most

    def forward(self, b: Tensor) -> Tensor:
        """B [out, most] with the columns from `rank` on left out; they get no gradient, nor do those rows of A."""
        if self.rank == self.most:
            return b
        kept = torch.cat([torch.ones(self.rank), torch.zeros(self.most - self.rank)]) * (self.most / self.rank)
        return b * kept.to(b)


def add_adapters(model: Any, lora: Lora) -> RankPrefix:
    """Freeze `model` and put adapters into it, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in lora.targets]
    missing = set(lora.targets) - {name.rpartition(".")[2] for name in targets}
    if missing:
        raise SortingError(f"lora.targets names {sorted(missing)}, which the model has not")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    make_config: Any = LoraConfig  # it takes a float for alpha, its signature says int
    config = make_config(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, model)
    prefix = RankPrefix(lora.rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (lora.norms and "norm" in name))
        if "lora_" in name:
            parameter.data = parameter.data.to(next(model.parameters()).dtype)
    if lora.sorted_ranks:
        for layer in adapted(model):
            parametrize.register_parametrization(layer.lora_B["default"], "weight", prefix)
    return prefix


def adapted(model: Any) -> list[Any]:
    """peft's layers."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def save_adapters(model: Any, lora: Lora, folder: Path) -> None:
    """As peft reads them: `PeftModel.from_pretrained(base, folder)`. Norms trained beside them are not in it."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            for kind in ("lora_A", "lora_B"):
                weight = getattr(module, kind)["default"].weight.detach()
                tensors[f"base_model.model.{name}.{kind}.weight"] = weight.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none"}
    config |= {"target_modules": sorted(lora.targets), "lora_dropout": 0.0, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def merge(model: Any, prefix: RankPrefix, rank: int = 0) -> None:
    """Fold the first `rank` ranks (0: all) into the weights, in place: W is rounded once, after the sum in float32."""
    prefix.rank = rank or prefix.most
    for name, module in list(model.named_modules()):
        if not hasattr(module, "lora_A"):
            continue
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        plain = module.base_layer
        with torch.no_grad():
            delta = (up.float() @ down.float()) * module.scaling["default"]
            plain.weight.copy_(plain.weight.float() + delta)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    prefix.rank = prefix.most
