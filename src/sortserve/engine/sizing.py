"""How much of the machine is taken: memory for K/V, the context length that it allows, threads."""

import contextlib
import ctypes
import os

import torch

from sortserve.engine import container
from sortserve.engine.config import EngineConfig
from sortserve.engine.errors import MemoryBudgetError, StartupError
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry

MOST_KV_BYTES = 2 << 30
"""K/V memory on the CPU if nobody says: a quarter of what is free, at most this."""


def default_kv_bytes() -> int:
    """Bytes for K/V on the CPU."""
    return min(MOST_KV_BYTES, _free_bytes() // 4)


def size_kv(config: EngineConfig, model: ModelConfig, geometry: KVGeometry, default_bytes: int) -> tuple[int, int]:
    """Pages that the K/V memory makes, and the context length. One sequence of that length must fit at full depth, with
    the exit states of one refill chunk."""
    kv_bytes = config.kv_bytes or default_bytes
    num_pages = kv_bytes // geometry.page_bytes
    state_pages = geometry.num_blocks(config.max_step_tokens) * geometry.state_pages
    fitting = max(0, num_pages - state_pages) // geometry.num_columns * geometry.block_tokens
    max_model_len = config.max_model_len or min(model.max_context, fitting)
    if max_model_len > model.max_context:
        raise StartupError(
            f"max_model_len is {max_model_len}, the model is made for {model.max_context}", param="max_model_len"
        )
    needed = geometry.pages_for(max(1, max_model_len)) + state_pages
    if max_model_len < 1 or num_pages < needed:
        raise MemoryBudgetError(
            f"K/V memory of {kv_bytes} bytes makes {num_pages} pages of {geometry.page_bytes} bytes; one sequence of "
            f"{max(1, max_model_len)} tokens at full depth and the exit states of one refill need {needed} "
            f"({needed * geometry.page_bytes} bytes). Give more with --kv-memory or lower --max-model-len",
            param="kv_bytes",
        )
    return num_pages, max_model_len


def most_threads() -> int:
    """PyTorch's number, or what a container's share of processor time keeps busy, where that is less: threads above it
    would be stopped half-way through a step, and all wait for them."""
    cpus = container.cpus()
    threads = torch.get_num_threads()
    return threads if cpus is None else max(1, min(threads, int(cpus)))


def give_back_freed_memory() -> None:
    """Freed pieces between those in use go back to the system. Loading the 0.5B model leaves 60 to 180 MiB of them, more in
    one process and less in the next; glibc keeps them, other C libraries have no such call."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no library of the process
        ctypes.CDLL(None).malloc_trim(0)


def _free_bytes() -> int:
    """Physical memory that is free now and that a container's limit leaves, as far as the system tells."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 4 * MOST_KV_BYTES  # macOS and Windows do not tell
    allowed = container.free_bytes()
    return free if allowed is None else min(free, allowed)
