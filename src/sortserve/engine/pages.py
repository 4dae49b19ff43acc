"""Pages: the unit in which K/V and exit states share one pool of bytes.

A page holds the K and V of one block (`block_tokens` tokens) for `page_layers` layers, the greatest common divisor of
the segment lengths, so that one pool serves every segment. A cell is what a block owns in one segment (whole pages), or
its exit states at one exit (whole pages of their own):

    block 0          block 1          block 2
    [seg 0][seg 1]   [seg 0][seg 1]   [seg 0]        <- a shallow request owns no pages of deeper segments
    pages..          pages..          [state @ 1]    <- residual stream of its tokens at exit 1, droppable
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

from sortserve.engine.submodel import ModelShape


@dataclass(frozen=True)
class KVGeometry:
    """Sizes that follow from the model and the ladder's exits. `bounds[s]..bounds[s + 1]` are the layers of segment s."""

    bounds: tuple[int, ...]  # the first is 0
    block_tokens: int
    hidden_size: int
    kv_width: int  # num_kv_heads * head_dim
    dtype_bytes: int  # of a value of the states
    kv_value_bytes: int  # of a value of K or V; a page's bytes hold either

    @classmethod
    def of(cls, shape: ModelShape, bounds: tuple[int, ...], block_tokens: int) -> "KVGeometry":
        """The geometry for a model's shape, with `shape.dtype_bytes` a number."""
        kv_width = shape.num_kv_heads * shape.head_dim
        return cls(bounds, block_tokens, shape.hidden_size, kv_width, shape.dtype_bytes, shape.bytes_per_kv_value)

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return len(self.bounds) - 1

    @cached_property
    def page_layers(self) -> int:
        """Layers whose K/V one page holds."""
        return math.gcd(*(self.segment_layers(segment) for segment in range(self.num_segments)))

    @property
    def page_elements(self) -> int:
        """Values of K and V of one page: [K or V, page_layers, block_tokens, kv_width]."""
        return 2 * self.page_layers * self.block_tokens * self.kv_width

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.page_elements * self.kv_value_bytes

    def segment_layers(self, segment: int) -> int:
        """Number of layers of a segment."""
        return self.bounds[segment + 1] - self.bounds[segment]

    def cell_pages(self, segment: int) -> int:
        """Pages that one block owns in a segment."""
        return self.segment_layers(segment) // self.page_layers

    def columns(self, segment: int) -> slice:
        """Columns of a page table [blocks, num_columns] that hold a segment's pages."""
        first = self.bounds[segment] // self.page_layers
        return slice(first, first + self.cell_pages(segment))

    @property
    def num_columns(self) -> int:
        """Pages that one block owns at full depth."""
        return self.bounds[-1] // self.page_layers

    @property
    def state_pages(self) -> int:
        """Pages that hold one block's exit states [block_tokens, hidden_size] at one exit."""
        return math.ceil(self.block_tokens * self.hidden_size * self.dtype_bytes / self.page_bytes)

    @cached_property
    def state_piece(self) -> int:
        """Values of a state that are moved at a time: the most of which whole numbers make a state and a page, so that a
        state may straddle pages."""
        return math.gcd(self.hidden_size, self.page_bytes // self.dtype_bytes)

    @property
    def page_pieces(self) -> int:
        """Pieces of states that one page holds."""
        return self.page_bytes // self.dtype_bytes // self.state_piece

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_tokens)

    def pages_for(self, num_tokens: int) -> int:
        """Pages for that many tokens at full depth, without exit states."""
        return self.num_blocks(num_tokens) * self.num_columns


class PagePool:
    """Hands out page numbers [0, num_pages); who holds them is the holder's business."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` pages, or None if there are fewer."""
        if count > len(self._free):
            return None
        if count == 0:
            return ()
        pages = tuple(self._free[-count:])
        del self._free[-count:]
        return pages

    def free(self, pages: tuple[int, ...]) -> None:
        """Take pages back."""
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "a page was freed twice"


@dataclass(eq=False, slots=True)
class Cell:
    """Pages of one block in one segment (or of its states at one exit), shared by `users` sequences.

    `key`: what it is published under in the prefix index, None while private. A published cell is whole and never
    written again. `children` counts published cells that can only be reached through this one: its successor in the
    same segment, its deeper neighbour, its states. It is evicted after them, so watermarks never rise along a chain.
    """

    pages: tuple[int, ...]
    users: int = 1
    key: bytes | None = None
    children: int = 0
    parents: tuple["Cell", ...] = field(default=())
