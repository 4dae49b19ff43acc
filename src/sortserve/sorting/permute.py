"""Write a model folder anew with its FFN neurons in another order. Nothing else changes.

Weights are read and written shard by shard, so memory holds one shard; tensors keep their dtype and file. All other files
of the folder are copied, but for a ladder, whose widths mean other neurons now, and leftovers of other formats.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sortserve.engine.checkpoint import ModelNames
from sortserve.engine.errors import SortingError
from sortserve.engine.model_config import ModelConfig

_LEFT_OUT = ("ladder.json", "ladder.svg", "model.gguf")
_LEFT_OUT_SUFFIXES = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


def write_permuted(source: Path, out: Path, config: ModelConfig, orders: Sequence[Tensor]) -> None:
    """Copy the model folder `source` into the empty folder `out`, layer i's FFN neurons in orders[i] [width].

    Raises SortingError if the weights cannot be read; OSError of a full disk goes to the caller.
    """
    rows, columns = _affected(config, orders)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and not _left_out(path):
            shutil.copyfile(path, out / path.name)
    for path in sorted(source.glob("*.safetensors")):
        _write_shard(path, out / path.name, rows, columns)


def folder_bytes(source: Path) -> int:
    """Bytes that `write_permuted` will write."""
    return sum(path.stat().st_size for path in source.iterdir() if path.is_file() and not _left_out(path))


def _left_out(path: Path) -> bool:
    return path.name in _LEFT_OUT or path.suffix in _LEFT_OUT_SUFFIXES


def _affected(config: ModelConfig, orders: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensor name -> order, of the tensors whose rows are neurons and of those whose columns are."""
    rows, columns = {}, {}
    for names, order in zip(ModelNames.of(config).layers, orders, strict=True):
        for name in (names.gate, names.up, names.gate_bias, names.up_bias):
            if name is not None:
                rows[name] = order
        columns[names.down] = order
    return rows, columns


def _write_shard(source: Path, target: Path, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if name in rows:
                    tensor = tensor[rows[name]]
                elif name in columns:
                    tensor = tensor[:, columns[name]]
                tensors[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
    except (OSError, SafetensorError) as error:
        raise SortingError(f"{source} cannot be read any more ({error}); was it replaced meanwhile?") from error
    try:
        save_file(tensors, target, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # the library wraps the operating system's error
        raise OSError(0, str(error), str(target)) from error
    target.chmod(0o644)  # safetensors writes it readable by its owner only
