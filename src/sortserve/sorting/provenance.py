"""Where a ladder's figures are from: data by hash, the command, versions and the machine."""

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch

import sortserve
from sortserve.engine.ladder_file import Measured
from sortserve.sorting.quality import BY_LOSS, METRIC_BY_LOSS
from sortserve.sorting.texts import Domain


def measured(domains: Sequence[Domain], *, quality: str, seconds: float) -> Measured:
    """The provenance of figures over `domains`, measured just now by this process."""
    told = ", ".join(f"{domain.name} ({len(domain.texts)} texts of {domain.origin})" for domain in domains)
    return Measured(
        metric=METRIC_BY_LOSS if quality == BY_LOSS else f"score of {quality} / score of the full model",
        data=told,
        command=command(),
        tokens=sum(domain.num_scored for domain in domains),
        quality=quality,
        data_sha256={domain.name: domain.digest for domain in domains},
        versions={
            "sortserve": sortserve.__version__,
            "torch": str(torch.__version__),
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        machine=machine(),
        date=time.strftime("%Y-%m-%d"),
        seconds=round(seconds, 1),
    )


def command() -> str:
    """What was typed, with the program's name instead of its path."""
    name = Path(sys.argv[0]).name
    return shlex.join(["sortserve" if name == "__main__.py" else name, *sys.argv[1:]])


def machine() -> str:
    """The processor and how many threads compute."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: platform's word has to do
    return f"{name}, {torch.get_num_threads()} threads"
