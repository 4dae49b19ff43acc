"""Sizes of the tiles of matrix products, and how many programs walk them: one table for all shapes, by numbers that the host
knows, so that graphs captured at start and eager steps run the same kernels."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

COVER = 128
"""Steps of a reduction with limits divide this."""
GROUP_ROWS = 16
"""Row tiles that are walked for all neurons before the next ones, so that x and the weights in use fit the L2 cache."""
PERSISTENT_ROWS = 256
"""From here on a fixed number of programs walk the tiles."""
SHARED_BYTES = 112 << 10
"""Shared memory for the loads in flight of a tile of few rows: two fit a Hopper multiprocessor."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tile of a product: rows, output channels and reduction of one step, warps, and loads in flight."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Card:
    """What sizes depend on: multiprocessors, and bytes of shared memory of one block."""

    processors: int
    shared_bytes: int


@lru_cache(maxsize=16)
def card_of(device: torch.device) -> Card:
    """The card's numbers; on the CPU 4 processors, so that the interpreter meets splits, and a Hopper's memory."""
    if device.type != "cuda":
        return Card(4, 227 << 10)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.multi_processor_count, int(getattr(properties, "shared_memory_per_block_optin", 99 << 10)))


def tile_rows(num_rows: int) -> int:
    """Rows of a tile; the same in every kernel of one FFN. From 64 on Hopper's warp-group products apply."""
    return next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)


def tiles_for(num_rows: int, x: Tensor, weight: Tensor) -> Tiles:
    """Of a product with a weight [n, k]."""
    rows = tile_rows(num_rows)
    out, inner, warps = (64, 128, 4) if rows <= 32 else (64, 64, 4) if rows == 64 else (128, 64, 8)
    return Tiles(
        rows, out, inner, warps, stages_for(rows, inner * (rows * x.itemsize + out * weight.itemsize), x.device)
    )


def stages_for(rows: int, step_bytes: int, device: torch.device) -> int:
    """Steps whose loads are in flight at a time."""
    shared = card_of(device).shared_bytes - (8 << 10)
    return max(2, min(4, (min(shared, SHARED_BYTES) if rows <= 64 else shared) // step_bytes))


def splits_for(num_tiles: int, k: int, inner: int, processors: int) -> int:
    """Parts of the reduction: enough tiles for two per multiprocessor, at least four steps each, 16 at most."""
    wanted = max(1, 2 * processors // max(1, num_tiles))
    return max(1, min(wanted, k // (4 * inner), 16))


def programs_for(num_rows: int, num_tiles: int, device: torch.device) -> int:
    """As many programs as tiles for few rows; for many one for each multiprocessor, which walk them."""
    return num_tiles if num_rows <= PERSISTENT_ROWS else min(num_tiles, card_of(device).processors)


def plan(rows: int, x: Tensor, weight: Tensor) -> tuple[Tiles, int]:
    """Tiles and parts of one product of `rows` rows; neither depends on limits, which only the device knows."""
    tiles, (n, k) = tiles_for(rows, x, weight), weight.shape
    num_tiles = triton.cdiv(n, tiles.out) * triton.cdiv(rows, tiles.rows)
    return tiles, splits_for(num_tiles, k, tiles.inner, card_of(x.device).processors)


def gate_up_tiles(rows: int, x: Tensor, gate: Tensor) -> Tiles:
    """Wide tiles where they fill the card twice, else narrow ones with longer steps."""
    block_r, width = tile_rows(rows), gate.shape[0]
    if block_r == 128:
        out, inner, warps = 128, 64, 8
    else:
        enough = 2 * card_of(x.device).processors
        row_tiles = triton.cdiv(rows, block_r)
        out = next((size for size in (64, 32) if row_tiles * triton.cdiv(width, size) >= enough), 16)
        inner, warps = (64 if block_r == 64 else 128 if out == 64 else 256), 4
    step_bytes = inner * (block_r * x.itemsize + 2 * out * gate.itemsize)
    return Tiles(block_r, out, inner, warps, stages_for(block_r, step_bytes, x.device))
