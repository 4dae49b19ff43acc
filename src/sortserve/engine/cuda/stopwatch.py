"""How long a step takes, by the device's own clock where it has one."""

import time
from collections.abc import Callable

import torch


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Started now; called, it stops after all that is launched until then, and what it returns waits for that and gives the
    seconds. On a GPU they begin when the device has come to where it was started: with the end of the step before."""
    if device.type != "cuda":
        began = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - began
            return lambda: seconds

        return stop
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()

    def stop_device() -> Callable[[], float]:
        last.record()

        def wait() -> float:
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3

        return wait

    return stop_device
