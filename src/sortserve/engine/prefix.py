"""The prefix index: whole blocks that any later sequence may share.

A cell of segment s is found under hash(parent, tokens, settings of the layers below the segment's end): K/V there depend
on nothing else, so how deep a block goes is simply for how many segments it is found. Deepening a shared block is
publishing one more cell beside those there are, and a filler that is aborted has published nothing: no lock is needed.
Two sequences that deepen the same block at once both compute it, and the second adopts the first one's cell.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from sortserve.engine.pages import Cell, PagePool


def root_key(*parts: object) -> bytes:
    """Start of a chain of block keys."""
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a block from its parent's key and its tokens."""
    return blake2b(parent + b"".join(token.to_bytes(4, "little") for token in tokens), digest_size=16).digest()


class PrefixIndex:
    """Published cells, and which of them nobody uses at present (least recently used first)."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._cells: dict[bytes, Cell] = {}
        self._idle: OrderedDict[Cell, None] = OrderedDict()
        self._known_tokens: Counter[bytes] = Counter()
        self._token_keys: dict[bytes, bytes] = {}
        self.version = 0  # rises with every change of what is published

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def cells(self) -> list[Cell]:
        """Every published cell, for the integrity check."""
        return list(self._cells.values())

    @property
    def idle_pages(self) -> int:
        """Pages held by cells that no sequence uses; all of them can be evicted."""
        return sum(len(cell.pages) for cell in self._cells.values() if cell.users == 0)

    def get(self, key: bytes) -> Cell | None:
        """The cell under `key`, or None."""
        return self._cells.get(key)

    def knows_tokens(self, token_key: bytes) -> bool:
        """Whether some cell holds these very tokens, under whatever settings."""
        return self._known_tokens[token_key] > 0

    def publish(self, key: bytes, cell: Cell, parents: Sequence[Cell], token_key: bytes) -> Cell:
        """Make a whole cell shareable; returns the cell to use from now on, which is an older one if `key` was taken
        (the caller then lets go of its own)."""
        older = self._cells.get(key)
        if older is not None:
            return older
        assert cell.key is None, "published twice"
        cell.key = key
        cell.parents = tuple(parents)
        for parent in parents:
            assert parent.key is not None, "a parent must be published first"
            parent.children += 1
            self._idle.pop(parent, None)  # it is evicted after its child
        self._cells[key] = cell
        self.version += 1
        self._known_tokens[token_key] += 1
        self._token_keys[key] = token_key
        return cell

    def acquire(self, cell: Cell) -> Cell:
        """One more user."""
        cell.users += 1
        self._idle.pop(cell, None)
        return cell

    def release(self, cell: Cell) -> None:
        """One user less. A private cell's pages return to the pool; a published one stays until it is evicted."""
        cell.users -= 1
        assert cell.users >= 0, "released more often than acquired"
        if cell.users > 0:
            return
        if cell.key is None:
            self._pool.free(cell.pages)
        elif cell.children == 0:
            self._idle[cell] = None

    def evict(self, pages_wanted: int) -> int:
        """Drop idle cells, least recently used first, until so many pages are free; returns how many it dropped."""
        dropped = 0
        while self._pool.num_free < pages_wanted and self._idle:
            cell, _ = self._idle.popitem(last=False)
            assert cell.key is not None, "only published cells idle"
            del self._cells[cell.key]
            self.version += 1
            token_key = self._token_keys.pop(cell.key)
            self._known_tokens[token_key] -= 1
            if self._known_tokens[token_key] == 0:
                del self._known_tokens[token_key]
            self._pool.free(cell.pages)
            cell.key = None
            for parent in reversed(cell.parents):  # the one in its own segment comes last, so it is the next to go
                parent.children -= 1
                if parent.children == 0 and parent.users == 0 and parent.key is not None:
                    # it is older than all that idles already
                    self._idle[parent] = None
                    self._idle.move_to_end(parent, last=False)
            cell.parents = ()
            dropped += 1
        return dropped
