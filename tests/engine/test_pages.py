"""Pages and the prefix index: who holds what, and what is evicted first."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine.pages import Cell, KVGeometry, PagePool
from sortserve.engine.prefix import PrefixIndex, chain_key, root_key
from sortserve.engine.submodel import ModelShape

COIN: st.SearchStrategy[Any] = st.booleans()

# ---- geometry


@given(
    st.sets(st.integers(1, 12), min_size=1),
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from([8, 16, 48]),
    st.sampled_from([None, 1]),
)
def test_geometry(exits: set[int], block_tokens: int, num_tokens: int, hidden: int, kv_value_bytes: int | None) -> None:
    shape = ModelShape(max(exits), hidden, 64, 2, 1, 8, 100, dtype_bytes=2, kv_value_bytes=kv_value_bytes)
    geometry = KVGeometry.of(shape, (0, *sorted(exits)), block_tokens)
    columns = [
        column for s in range(geometry.num_segments) for column in range(geometry.num_columns)[geometry.columns(s)]
    ]
    assert columns == list(range(geometry.num_columns)), "segments share no column and leave none out"
    for segment in range(geometry.num_segments):
        assert geometry.cell_pages(segment) * geometry.page_layers == geometry.segment_layers(segment)
    blocks = geometry.num_blocks(num_tokens)
    assert (blocks - 1) * block_tokens < num_tokens <= blocks * block_tokens
    kv_bytes = blocks * block_tokens * max(exits) * shape.kv_bytes_per_token_layer
    assert geometry.pages_for(num_tokens) * geometry.page_bytes == kv_bytes
    state_bytes = block_tokens * hidden * 2
    assert (geometry.state_pages - 1) * geometry.page_bytes < state_bytes <= geometry.state_pages * geometry.page_bytes


def test_fp8_halves_the_pages_and_not_the_states() -> None:
    shape = ModelShape(24, 96, 64, 2, 1, 8, 100)
    wide, narrow = (
        KVGeometry.of(dataclasses.replace(shape, kv_value_bytes=size), (0, 12, 18, 24), 16) for size in (None, 1)
    )
    assert narrow.page_elements == wide.page_elements
    assert 2 * narrow.page_bytes == wide.page_bytes == 2 * 6 * 16 * 8 * 2
    assert (narrow.state_pages, wide.state_pages) == (2, 1)  # 3,072 bytes in pages of 1,536 and of 3,072
    assert (narrow.state_piece, narrow.page_pieces) == (96, 8)
    assert (wide.state_piece, wide.page_pieces) == (96, 16)


def test_page_layers_is_the_greatest_common_divisor() -> None:
    shape = ModelShape(24, 16, 64, 2, 1, 8, 100)
    assert KVGeometry.of(shape, (0, 12, 18, 24), 16).page_layers == 6
    assert KVGeometry.of(shape, (0, 12, 18, 23), 16).page_layers == 1
    assert KVGeometry.of(shape, (0, 24), 16).page_layers == 24


# ---- pool


@given(st.integers(0, 30), st.lists(st.integers(0, 9)))
def test_pool(num_pages: int, counts: list[int]) -> None:
    pool = PagePool(num_pages)
    held: list[tuple[int, ...]] = []
    for count in counts:
        left = num_pages - sum(map(len, held))
        assert pool.num_free == left
        pages = pool.allocate(count)
        assert (pages is None) == (count > left), "as long as there are enough, all or nothing"
        if pages is not None:
            assert len(pages) == count
            held.append(pages)
        elif held:
            pool.free(held.pop(0))
        every = [page for pages in held for page in pages]
        assert len(set(every)) == len(every)
        assert set(every) <= set(range(num_pages))


def test_freeing_twice_is_a_bug() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages[:1])


# ---- keys


@given(st.lists(st.integers(0, 2**31), min_size=2, max_size=4, unique=True))
def test_keys_tell_order_parent_and_root(tokens: list[int]) -> None:
    root = root_key(0, 1)
    assert chain_key(root, tokens) == chain_key(root, tuple(tokens))
    assert chain_key(root, tokens) != chain_key(root, tokens[::-1])
    assert chain_key(root, tokens) != chain_key(root_key(0, 2), tokens)
    assert chain_key(chain_key(root, tokens[:1]), tokens[1:]) != chain_key(root, tokens)
    assert root_key(0, 1) != root_key(0) != root_key("states", 0)


# ---- index


class Chains:
    """Chains of published cells, each cell with one page: (chain, segment, block)."""

    def __init__(self, num_pages: int = 64) -> None:
        self.pool = PagePool(num_pages)
        self.index = PrefixIndex(self.pool)
        self.cells: dict[tuple[int, int, int], Cell] = {}

    def publish(self, chain: int, segment: int, block: int) -> Cell:
        pages = self.pool.allocate(1)
        assert pages is not None
        places = [(chain, segment, block - 1), (chain, segment - 1, block)]
        parents = [self.cells[place] for place in places if place[1] >= 0 and place[2] >= 0]
        cell = self.index.publish(repr((chain, segment, block)).encode(), Cell(pages), parents, b"%d" % block)
        self.cells[chain, segment, block] = cell
        return cell

    def publish_whole(self, chain: int, segments: int, blocks: int) -> None:
        for segment in range(segments):
            for block in range(blocks):
                self.publish(chain, segment, block)

    def release_whole(self, chain: int) -> None:
        """As a sequence does: last block first, deepest segment first."""
        for place in sorted((place for place in self.cells if place[0] == chain), reverse=True):
            self.index.release(self.cells[place])

    def evict_one(self) -> tuple[int, int, int]:
        before = self.there()
        assert self.index.evict(self.pool.num_free + 1) == 1
        (gone,) = before - self.there()
        return gone

    def there(self) -> set[tuple[int, int, int]]:
        return {place for place in self.cells if self.index.get(repr(place).encode()) is not None}


def test_eviction_goes_deepest_segment_first_and_leaves_first() -> None:
    """It went block by block through all segments, so that a first page wanted cost the whole prefix its last tokens."""
    chains = Chains()
    chains.publish_whole(0, segments=3, blocks=2)
    chains.release_whole(0)
    order = [chains.evict_one()[1:] for _ in range(6)]
    assert order == [(2, 1), (2, 0), (1, 1), (1, 0), (0, 1), (0, 0)]
    assert chains.pool.num_free == chains.pool.num_pages
    assert len(chains.index) == 0
    assert not chains.index.knows_tokens(b"0")


def test_the_least_recently_used_chain_goes_first() -> None:
    chains = Chains()
    for chain in range(3):
        chains.publish_whole(chain, segments=1, blocks=2)
    for chain in (1, 0, 2):
        chains.release_whole(chain)
    for place, cell in chains.cells.items():
        if place[0] == 1:
            chains.index.acquire(cell)
    chains.release_whole(1)  # used again: now it is the youngest
    assert [chains.evict_one()[0] for _ in range(6)] == [0, 0, 2, 2, 1, 1]


def test_what_is_used_stays() -> None:
    chains = Chains()
    chains.publish_whole(0, segments=2, blocks=2)
    chains.release_whole(0)
    used = chains.index.acquire(chains.cells[0, 0, 1])
    assert chains.index.evict(64) == 2  # the deep ones; (0, 0) is a parent of what is used
    assert chains.there() == {(0, 0, 0), (0, 0, 1)}
    assert chains.index.idle_pages == 1
    chains.index.release(used)
    assert chains.index.evict(64) == 2


def test_a_child_of_an_idle_cell_keeps_it() -> None:
    """Publishing under a parent that nobody used left the parent among those to evict, which then failed."""
    chains = Chains()
    chains.publish(0, 0, 0)
    chains.index.release(chains.cells[0, 0, 0])
    child = chains.publish(0, 0, 1)
    assert chains.index.evict(64) == 0
    chains.index.release(child)
    assert chains.index.evict(64) == 2


def test_a_second_publisher_gets_the_first_ones_cell() -> None:
    chains = Chains()
    first = chains.publish(0, 0, 0)
    free = chains.pool.num_free
    assert chains.publish(0, 0, 0) is first
    assert len(chains.index) == 1
    assert chains.pool.num_free == free - 1, "the second lets go of its own by itself"


def test_misuse_is_a_bug() -> None:
    chains = Chains()
    cell = chains.publish(0, 0, 0)
    chains.index.release(cell)
    with pytest.raises(AssertionError, match="more often"):
        chains.index.release(cell)
    with pytest.raises(AssertionError, match="published first"):
        chains.index.publish(b"child", Cell((1,)), [Cell((2,))], b"")


@given(st.data())
def test_watermarks_never_rise_along_a_chain(data: st.DataObject) -> None:
    """After any publishing, using and evicting: a cell that is there can be reached, through its own segment's chain and
    through the segments below, so the depth of blocks never rises along a chain."""
    chains = Chains(200)
    users: list[Cell] = []
    shape: list[list[int]] = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3)
    )
    for chain, depths in enumerate(shape):
        falling = sorted(depths, reverse=True)
        for segment in range(3):
            for block, depth in enumerate(falling):
                if segment < depth:
                    chains.publish(chain, segment, block)
        chains.release_whole(chain)
    for _ in range(data.draw(st.integers(1, 8))):
        there = chains.there()
        if there and data.draw(COIN):
            chain, segment, block = data.draw(st.sampled_from(sorted(there)))
            users += [  # as a sequence does: everything on the way
                chains.index.acquire(chains.cells[chain, s, b]) for s in range(segment + 1) for b in range(block + 1)
            ]
        elif users and data.draw(COIN):
            for cell in users:
                chains.index.release(cell)
            users.clear()
        chains.index.evict(chains.pool.num_free + data.draw(st.integers(1, 6)))
        there = chains.there()
        for chain, segment, block in there:
            assert segment == 0 or (chain, segment - 1, block) in there
            assert block == 0 or (chain, segment, block - 1) in there
        for cell in users:
            assert cell.key is not None, "evicted under its user"
        pages = sum(len(cell.pages) for cell in chains.index.cells)
        assert pages + chains.pool.num_free == chains.pool.num_pages
    for cell in users:
        chains.index.release(cell)
    assert chains.index.idle_pages == chains.pool.num_pages - chains.pool.num_free
    chains.index.evict(chains.pool.num_pages)
    assert chains.pool.num_free == chains.pool.num_pages, "every idle page can be evicted"
