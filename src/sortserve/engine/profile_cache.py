"""Where fitted cost tables are kept between starts: one file per machine, model, dtype, threads and ladder."""

import hashlib
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

from sortserve.engine.cost import CostTable
from sortserve.engine.cost_file import read_cost, write_cost
from sortserve.kernels import compiling

logger = logging.getLogger(__name__)

_LEAST_SLOWNESS = 0.8


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sortserve/profiles`, in `~/.cache` if that is not set. Raises RuntimeError without a home."""
    return compiling.cache_folder() / "profiles"


def fitted(
    about: dict[str, str],
    measure: Callable[[], CostTable],
    slowness: Callable[[CostTable], float] = lambda table: 1.0,
    *,
    use_cache: bool = True,
) -> tuple[CostTable, bool]:
    """The table that was fitted under the same circumstances, and True; else a new one, which is kept if possible. A file
    that cannot be read is measured anew, a folder that cannot be written costs one line of the log. So is one that was
    made while the machine was busy: `slowness`, of the machine now over the table, is below what noise explains."""
    if not use_cache:
        return measure(), False
    about = about | machine()
    name = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:32]
    try:
        path = cache_folder() / f"{name}.json"
        table = read_cost(path)
        if slowness(table) >= _LEAST_SLOWNESS:
            logger.info("step times read from %s", path)
            return table, True
        logger.info("step times are measured anew: those in %s were made on a busier machine", path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("step times are measured anew: %s", error)
    table = measure()
    try:
        path = cache_folder() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_cost(path, table, about)
        logger.info("step times kept in %s", path)
    except (OSError, RuntimeError) as error:
        logger.info("step times are not kept between starts: %s", error)
    return table, False


def machine() -> dict[str, str]:
    """What the times of this machine depend on."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: platform's word has to do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": str(cores), "node": platform.node(), "python": platform.python_version()}
