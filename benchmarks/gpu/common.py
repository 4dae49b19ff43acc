"""What the GPU benchmarks share: a measured point, the device and its ceilings, timing, and a clock that says when to stop.

Every kernel's benchmark is a module here with `run(device) -> list[Result]`. `--dry-run` runs them on the CPU with Triton's
interpreter: then `small(device)` is true, shapes are tiny, and the times mean nothing.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

ROUNDS = 25
MOST_SECONDS = 0.6
"""Time for the rounds of one measurement, beyond its warm-up."""
FLUSH_BYTES = 256 << 20
"""Written between two rounds, so that no round finds its weights in the L2 cache (50 MB on an H100)."""


@dataclass(frozen=True)
class Result:
    """One measured point. `ceiling_ms` is the least time in which the device could move `bytes` or do `flops`, whichever is
    longer; `compared` holds milliseconds of other implementations of the same thing, by name."""

    name: str
    shape: str
    milliseconds: float
    bytes: int
    flops: int
    ceiling_ms: float
    compared: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the ceiling that is reached."""
        return self.ceiling_ms / self.milliseconds if self.milliseconds else 0.0


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured: bytes a second of a large copy (read + written), FLOPs a second of a product."""

    bytes_per_second: float
    flops_per_second: float

    def milliseconds(self, num_bytes: int, flops: int) -> float:
        """Least time for so many bytes and so many FLOPs."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second) * 1e3


def small(device: torch.device | str) -> bool:
    """Whether shapes must be tiny: the interpreter runs Python for every program."""
    return torch.device(device).type != "cuda"


def model_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a GPU; float32 under the interpreter, whose bfloat16 products are garbage."""
    return torch.float32 if small(device) else torch.bfloat16


@lru_cache(maxsize=4)
def ceilings(device: torch.device) -> Ceilings:
    """Measured once: reading a gigabyte, and a product of two 8192 x 8192 matrices in bfloat16. Tiny ones on the CPU."""
    tiny = small(device)
    data = torch.ones((1 << 20) if tiny else (1 << 30), dtype=torch.int8, device=device)
    target = torch.empty_like(data)
    side = 64 if tiny else 8192
    matrix = torch.ones(side, side, dtype=model_dtype(device), device=device)
    read_and_write = 2 * data.nbytes / (milliseconds(lambda: target.copy_(data), device) * 1e-3)
    # a copy turns the bus around; reading alone is the faster of the two on every card seen, so the higher one counts
    view = data.view(torch.int32)
    reading = data.nbytes / (milliseconds(lambda: view.sum(), device) * 1e-3)
    flops = 2 * side**3 / (milliseconds(lambda: matrix @ matrix, device, flush=False) * 1e-3)
    return Ceilings(max(read_and_write, reading), flops)


def milliseconds(
    call: Callable[[], object], device: torch.device | str, *, rounds: int = ROUNDS, flush: bool = True
) -> float:
    """Median device time of `call`, each round with a cold L2 cache if `flush`. On the CPU: wall time of one round."""
    if small(device):
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None
    for _ in range(3):
        call()
    torch.cuda.synchronize(device)
    times, began = list[float](), time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() - began < MOST_SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        if scratch is not None:
            scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graphed(call: Callable[[], object], device: torch.device | str) -> Callable[[], object]:
    """`call` as a CUDA graph, so that launches of small kernels are not what is measured. `call` must not sync. On the CPU
    the call itself."""
    if small(device):
        return call
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def result(
    name: str,
    shape: str,
    call: Callable[[], object],
    device: torch.device,
    *,
    num_bytes: int,
    flops: int,
    compared: Mapping[str, Callable[[], object]] | None = None,
    graph: bool = True,
) -> Result:
    """Measure `call` and what it is compared with, all alike: as graphs (unless `graph` is False), with a cold cache."""

    def measure(one: Callable[[], object]) -> float:
        return milliseconds(graphed(one, device) if graph else one, device)

    return Result(
        name,
        shape,
        measure(call),
        num_bytes,
        flops,
        ceilings(device).milliseconds(num_bytes, flops),
        {other: measure(one) for other, one in (compared or {}).items()},
    )


class Clock:
    """Time left for a section: long loops ask it before each further point."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def spent(self) -> bool:
        """Whether to stop here."""
        return self.left <= 0
