"""Which device and which kernels run: chosen once, at start, by what is asked for and what is there.

asked         there                                    chosen
cpu           anything                                 cpu
auto          a CUDA GPU of 8.0 or newer, and triton   the first GPU, Triton kernels
auto          else                                     cpu; `reason` says what was missing for the GPU
cuda[:n]      the same                                 that GPU
cuda[:n]      else                                     ValueError, with what is missing
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 and asynchronous copies."""


@dataclass(frozen=True)
class Dispatch:
    """What runs, in words for logs and answers."""

    device: str  # cpu or cuda:<index>
    name: str  # of the GPU; empty for the CPU
    kernels: str  # empty for the CPU: `products.py` chooses there
    reason: str = ""  # why it is not a GPU, where one would have been taken

    @property
    def is_cuda(self) -> bool:
        """Whether steps run on a CUDA GPU."""
        return self.device.startswith("cuda")


def choose(asked: str) -> Dispatch:
    """`asked`: auto, cpu, cuda or cuda:<index>. Raises ValueError if a GPU is asked for that cannot be had."""
    if asked == "cpu":
        return _cpu()
    missing = _missing(asked)
    if missing and asked != "auto":
        raise ValueError(f"device {asked}: {missing}; use --device cpu")
    if missing:
        return _cpu(missing)
    index = int(asked.partition(":")[2] or 0)
    major, minor = torch.cuda.get_device_capability(index)
    kernels = f"triton {version('triton')} for sm_{major}{minor}"
    return Dispatch(f"cuda:{index}", torch.cuda.get_device_name(index), kernels)


def _missing(asked: str) -> str:
    """What stands in the way of the GPU; "" for nothing."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "no CUDA GPU is usable" if built else f"this PyTorch ({torch.__version__}) is built without CUDA"
    index, count = int(asked.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        return f"there are {count} CUDA GPUs, numbered from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, not {least}"
        )
    try:
        version("triton")
    except PackageNotFoundError:
        return "triton is not installed (pip install 'sortserve[gpu]')"
    return ""


def _cpu(reason: str = "") -> Dispatch:
    return Dispatch("cpu", "", "", reason)
