"""An unfinished run on disk: whole or not there.

Contract: `save` writes beside what is there and renames at the end, so a kill or a full disk in the middle leaves the
older ones; two are kept. `load_newest` gives the newest whole one, says on stderr which it passed over and why, and raises
SortingError if there are some but none is whole. Nothing that is read is run: tensors are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.sorting.folder import to_disk

KEPT = 2


@dataclass(frozen=True)
class SavedRun:
    """What a run goes on from. `facts` is JSON: counts, seconds, sums of the log line in progress, the fingerprint."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save(folder: Path, run: SavedRun) -> None:
    """Raises OSError (no space, say) with everything older untouched."""
    update = int(run.facts["update"])
    target, writing = folder / f"update-{update:09d}", folder / f".writing-{os.getpid()}"
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        path = writing / "state.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in run.tensors.items()}, path)
        except SafetensorError as error:  # what it makes of a failed write
            raise OSError(f"{path}: {error}") from error
        facts = {**run.facts, "sha256": _digest(path)}
        (writing / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        for name in ("state.safetensors", "state.json"):
            to_disk(writing / name)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
        to_disk(folder)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    for old in _saved(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(folder: Path) -> SavedRun | None:
    """None if nothing was saved. Raises SortingError if nothing saved is whole."""
    passed_over = []
    for place in reversed(_saved(folder)):
        try:
            return _load(place)
        except SortingError as error:
            passed_over.append(error.message)
            print(f"passed over: {error.message}", file=sys.stderr)
    if passed_over:
        raise SortingError(f"{passed_over[0]}, and no older one is whole; --fresh starts anew")
    return None


def _load(place: Path) -> SavedRun:
    path = place / "state.safetensors"
    try:
        facts = json.loads((place / "state.json").read_text(encoding="utf-8"))
        digest = facts["sha256"]
        if _digest(path) != digest:
            raise SortingError(f"{path} is truncated or was changed: its hash is not the one saved with it")
        tensors = load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SortingError(f"{place}: {type(error).__name__}: {error}") from error
    bad = first_not_finite(tensors)
    if bad:
        raise SortingError(f"{path}: {bad} holds NaN or infinity")
    return SavedRun(tensors, facts)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of a tensor that holds NaN or infinity; empty if none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return ""


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("update-*"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
