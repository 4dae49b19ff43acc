"""The KV manager: gives sequences pages, keeps watermarks true, shares whole blocks, and takes pages back.

Answers are opaque: True or None-like "not now" where memory is short; exceptions are bugs.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from sortserve.engine.pages import Cell, KVGeometry, PagePool
from sortserve.engine.plan import Span
from sortserve.engine.prefix import PrefixIndex
from sortserve.engine.sequence_kv import SequenceKV


class KVManager:
    """Pages of all sequences and of the prefix cache. `events` counts what happened, by name, for metrics and tests."""

    def __init__(self, geometry: KVGeometry, num_pages: int, *, prefix_cache: bool = True) -> None:
        self.geometry = geometry
        self.pool = PagePool(num_pages)
        self.prefix = PrefixIndex(self.pool)
        self.events: Counter[str] = Counter()
        self._share = prefix_cache

    def new_sequence(self, capacity: int) -> SequenceKV:
        """Bookkeeping for a sequence of at most `capacity` tokens; owns nothing yet."""
        return SequenceKV(self.geometry, capacity)

    # ---- before a step

    def adopt(self, sequence: SequenceKV, tokens: Sequence[int], exit: int, target: tuple[int, ...]) -> int:
        """Take over published blocks that hold what `sequence` would compute to `exit`; returns tokens x segments found.

        Only chains computed throughout with one set of settings are taken, and never the last known token, whose
        logits are still to be had.
        """
        if not self._share:
            return 0
        size = self.geometry.block_tokens
        found = 0
        limit = len(tokens) - 1
        settings: tuple[int, ...] = ()
        for segment in range(exit):
            recorded = int(sequence.settings[segment, 0])
            settings = (*settings, recorded if recorded >= 0 else target[segment])
            while sequence.watermark[segment] % size == 0 and sequence.watermark[segment] + size <= limit:
                if not self._adopt_one(sequence, tokens, segment, target, settings):
                    break
                found += size
            limit = min(limit, sequence.watermark[segment])
        if found:
            self.events["prefix_hit"] += 1
            self._adopt_states(sequence, tokens, exit)
        return found

    def _adopt_one(
        self,
        sequence: SequenceKV,
        tokens: Sequence[int],
        segment: int,
        target: tuple[int, ...],
        settings: tuple[int, ...],
    ) -> bool:
        """Take over the block at the watermark of `segment`, if it is published under `settings`."""
        start = sequence.watermark[segment]
        block = start // self.geometry.block_tokens
        stop = start + self.geometry.block_tokens
        for below, wanted in enumerate(settings):
            unrecorded = (sequence.settings[below, :stop] == -1).any()
            if not sequence.uniform(below, stop, wanted) or (unrecorded and target[below] != wanted):
                self.events["mixed_chain_refused"] += 1
                return False
        cell = self.prefix.get(sequence.block_key("kv", settings, block, tokens))
        if cell is None:
            if self.prefix.knows_tokens(sequence.block_key("tokens", (segment,), block, tokens)):
                self.events["width_mismatch_refused"] += 1
            return False
        replaced = sequence.put(segment, block, self.prefix.acquire(cell))
        if replaced is not None:
            self.prefix.release(replaced)
        sequence.settings[segment, start:stop] = settings[segment]
        sequence.watermark[segment] = stop
        return True

    def _adopt_states(self, sequence: SequenceKV, tokens: Sequence[int], exit: int) -> None:
        """Take over published exit states of the blocks that are not there up to `exit`."""
        size = self.geometry.block_tokens
        for block in range(sequence.watermark[exit - 1] // size, sequence.watermark[0] // size):
            start, stop = block * size, (block + 1) * size
            reached = sum(1 for segment in range(exit) if sequence.watermark[segment] >= stop)
            if reached == 0 or (sequence.resume[start:stop] == reached).all():
                continue
            settings = tuple(int(sequence.settings[segment, start]) for segment in range(reached))
            if not all(sequence.uniform(segment, stop, wanted) for segment, wanted in enumerate(settings)):
                continue  # a state depends on all tokens before it
            state = self.prefix.get(sequence.block_key("states", settings, block, tokens))
            if state is None:
                continue
            replaced = sequence.states.get((block, reached))
            sequence.states[(block, reached)] = self.prefix.acquire(state)
            if replaced is not None:
                self.prefix.release(replaced)
            sequence.resume[start:stop] = reached
            self.release_cells(sequence.take_stale_states(start, stop))
            self.events["states_adopted"] += 1

    def cached_tokens(self, sequence: SequenceKV, tokens: Sequence[int], settings: tuple[int, ...], limit: int) -> int:
        """Leading tokens, at most `limit`, whose K/V under `settings` of the last segment that these name are published."""
        if not self._share:
            return 0
        size, block = self.geometry.block_tokens, 0
        while (block + 1) * size <= limit:
            if self.prefix.get(sequence.block_key("kv", settings, block, tokens)) is None:
                break
            block += 1
        return block * size

    def reserve(self, sequence: SequenceKV, exit: int, stop: int, *, states: bool) -> bool:
        """Own cells for tokens [0, stop) in segments [0, exit), and state pages of the rows to run if `states`.

        All or nothing; False means not now.
        """
        blocks = self.geometry.num_blocks(stop)
        if not states and len(sequence.cells[exit - 1]) >= blocks:  # never more of them in deeper segments
            return True
        wanted: list[tuple[int, int]] = [
            (segment, block) for segment in range(exit) for block in range(len(sequence.cells[segment]), blocks)
        ]
        wanted_states: list[tuple[int, int]] = []
        if states and exit < self.geometry.num_segments:
            first = sequence.watermark[exit - 1] // self.geometry.block_tokens
            wanted_states = [(block, exit) for block in range(first, blocks) if (block, exit) not in sequence.states]
        count = sum(self.geometry.cell_pages(segment) for segment, _ in wanted)
        count += len(wanted_states) * self.geometry.state_pages
        if count > self.pool.num_free:
            return False
        for segment, block in wanted:
            sequence.put(segment, block, self._new_cell(self.geometry.cell_pages(segment)))
        for place in wanted_states:
            sequence.states[place] = self._new_cell(self.geometry.state_pages)
        return True

    def _new_cell(self, num_pages: int) -> Cell:
        pages = self.pool.allocate(num_pages)
        assert pages is not None, "the caller has counted"
        return Cell(pages)

    def pages_to_reserve(self, sequence: SequenceKV, exit: int, stop: int, *, states: bool) -> int:
        """Upper bound of the pages that `reserve` would take."""
        blocks = self.geometry.num_blocks(stop)
        count = sum(
            max(0, blocks - len(sequence.cells[segment])) * self.geometry.cell_pages(segment) for segment in range(exit)
        )
        if states and exit < self.geometry.num_segments:
            first = sequence.watermark[exit - 1] // self.geometry.block_tokens
            count += (blocks - first) * self.geometry.state_pages
        return count

    # ---- after a step

    def advance(
        self, sequence: SequenceKV, tokens: Sequence[int], exit: int, spans: Sequence[Span], *, states: bool
    ) -> None:
        """The rows of `spans` have run: raise watermarks, let go of states no longer needed, publish whole blocks."""
        sequence.record(exit, spans, states_kept=states)
        if sequence.states:
            self.release_cells(sequence.take_stale_states(spans[0].start, spans[-1].stop))
        if self._share and (len(spans) > 1 or spans[0].num_rows > 1 or spans[0].stop % self.geometry.block_tokens == 0):
            self._publish(sequence, tokens, exit)

    def _publish(self, sequence: SequenceKV, tokens: Sequence[int], exit: int) -> None:
        """Offer the blocks that have become whole, as far as the chain has one set of settings from its start."""
        size = self.geometry.block_tokens
        settings: tuple[int, ...] = ()
        for segment in range(exit):
            settings = (*settings, int(sequence.settings[segment, 0]))
            whole = min(sequence.watermark[segment], len(tokens)) // size
            for block in range(sequence.published[segment], whole):
                stop = (block + 1) * size
                if not all(sequence.uniform(below, stop, wanted) for below, wanted in enumerate(settings)):
                    break
                if block > 0 and self.prefix.get(sequence.block_key("kv", settings, block - 1, tokens)) is None:
                    break
                self._publish_block(sequence, tokens, segment, block, settings)
                sequence.published[segment] = block + 1

    def _publish_block(
        self, sequence: SequenceKV, tokens: Sequence[int], segment: int, block: int, settings: tuple[int, ...]
    ) -> None:
        own = sequence.cells[segment][block]
        token_key = sequence.block_key("tokens", (segment,), block, tokens)
        parents: list[Cell] = []
        for below, parent_block in ((settings, block - 1), (settings[:-1], block)):
            if parent_block >= 0 and below:
                parent = self.prefix.get(sequence.block_key("kv", below, parent_block, tokens))
                if parent is None:
                    return  # its chain was cut by an eviction: unreachable, so not offered
                parents.append(parent)
        if own.key is None:
            shared = self.prefix.publish(sequence.block_key("kv", settings, block, tokens), own, parents, token_key)
            if shared is not own:
                sequence.put(segment, block, self.prefix.acquire(shared))
                self.prefix.release(own)
            elif segment > 0 and sequence.cells[0][block].users > 1:
                self.events["shared_block_deepened"] += 1
        self._publish_states(sequence, tokens, block, settings, token_key)

    def _publish_states(
        self,
        sequence: SequenceKV,
        tokens: Sequence[int],
        block: int,
        settings: tuple[int, ...],
        token_key: bytes,
    ) -> None:
        """Offer the states kept above the segments of `settings`, if all tokens of the block have theirs there."""
        exit = len(settings)
        own = sequence.states.get((block, exit))
        size = self.geometry.block_tokens
        if own is None or own.key is not None or not (sequence.resume[block * size : (block + 1) * size] == exit).all():
            return
        parent = self.prefix.get(sequence.block_key("kv", settings, block, tokens))
        if parent is None:
            return
        key = sequence.block_key("states", settings, block, tokens)
        shared = self.prefix.publish(key, own, [parent], token_key)
        if shared is not own:
            sequence.states[(block, exit)] = self.prefix.acquire(shared)
            self.prefix.release(own)

    # ---- giving back

    def release_cells(self, cells: Iterable[Cell]) -> None:
        """One user less for each."""
        for cell in cells:
            self.prefix.release(cell)

    def release_deep(self, sequence: SequenceKV, exit: int) -> None:
        """Drop the pages of segments >= exit. The tokens' recorded settings stay, for a replay."""
        self.release_cells(sequence.take_cells(exit))
        self.release_cells(sequence.take_states(exit))
        self.events["release"] += 1

    def drop_states(self, sequence: SequenceKV) -> None:
        """Drop all exit states; a later refill of these tokens starts at layer 0."""
        self.release_cells(sequence.take_states())

    def free(self, sequence: SequenceKV) -> None:
        """Drop everything that the sequence holds; whole published blocks stay in the prefix cache."""
        self.release_cells(sequence.take_states())
        self.release_cells(sequence.take_cells(0))

    def change_settings(self, sequence: SequenceKV, target: tuple[int, ...], exit: int, num_tokens: int) -> None:
        """`kv: exact`: all tokens get `target`'s settings. What differs is dropped, from the first segment that does."""
        first = sequence.first_difference(target[:exit], num_tokens)
        if first is None:
            return
        self.release_cells(sequence.take_cells(first))
        self.release_cells(sequence.take_states(first))
        sequence.forget_settings(first)
        self.events["exact_recompute"] += 1

    def make_room(self, pages: int) -> bool:
        """Evict cached blocks that nobody uses until so many pages are free."""
        if pages > self.pool.num_free and self.prefix.evict(pages):
            self.events["evicted"] += 1
        return pages <= self.pool.num_free

    # ---- integrity

    def check_integrity(self, sequences: Iterable[SequenceKV]) -> None:
        """Assert that free + used + cached pages are all pages, each held once, that users are counted right, and that
        watermarks never rise with depth. Cheap enough for every test's teardown."""
        users: Counter[Cell] = Counter()
        for sequence in sequences:
            for segment, cells in enumerate(sequence.cells):
                users.update(cells)
                assert sequence.watermark[segment] <= len(cells) * self.geometry.block_tokens, "K/V without a page"
                for block, cell in enumerate(cells):
                    row = sequence.table[block, self.geometry.columns(segment)]
                    assert tuple(row.tolist()) == cell.pages, "page table out of step"
            assert sequence.watermark == sorted(sequence.watermark, reverse=True), sequence.watermark
            users.update(sequence.states.values())
        published = self.prefix.cells
        for cell in {*users, *published}:
            assert cell.users == users[cell], f"cell counts {cell.users} users, has {users[cell]}"
            assert cell.key is not None or cell.users == 1, "a private cell has one user"
        held = [page for cell in {*users, *published} for page in cell.pages]
        assert len(set(held)) == len(held), "a page is held twice"
        assert len(held) + self.pool.num_free == self.pool.num_pages, "a page was lost"
