"""The KV manager: sharing whole blocks, reserving, giving back, and the integrity check that must be able to fail."""

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sortserve.engine.kv import KVManager
from sortserve.engine.pages import Cell
from sortserve.engine.sequence_kv import SequenceKV
from tests.engine.small import BLOCK, GEOMETRY, NUM_SEGMENTS, compute

TOKENS = list(range(14))  # three whole blocks of 4, and 2 more
FULL = NUM_SEGMENTS
PER_BLOCK = GEOMETRY.num_columns  # pages at full depth


def new_kv(num_pages: int = 200) -> KVManager:
    return KVManager(GEOMETRY, num_pages)


def computed(kv: KVManager, tokens: list[int], exit: int, setting: int = 0, *, states: bool = False) -> SequenceKV:
    sequence = kv.new_sequence(48)
    compute(kv, sequence, tokens, exit, (setting,) * exit, states=states)
    return sequence


# ---- publish and adopt


def test_whole_blocks_are_shared() -> None:
    kv = new_kv()
    first = computed(kv, TOKENS, FULL)
    free = kv.pool.num_free
    second = kv.new_sequence(48)
    assert kv.adopt(second, TOKENS, FULL, (0,) * FULL) == 12 * FULL
    assert second.watermark == [12] * FULL
    assert kv.pool.num_free == free
    assert (second.table[:3] == first.table[:3]).all()
    assert (second.settings[:, :12] == 0).all()
    assert (second.settings[:, 12:] == -1).all()
    kv.check_integrity([first, second])
    kv.free(first)
    kv.free(second)
    assert kv.prefix.idle_pages == 3 * PER_BLOCK, "whole blocks stay, the half one does not"
    kv.check_integrity([])


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, FULL), st.integers(1, FULL))
def test_the_last_token_is_never_adopted(known: int, wanted: int, exit_there: int, exit_wanted: int) -> None:
    """Its logits are still to be had."""
    kv = new_kv()
    first = computed(kv, list(range(known)), exit_there)
    second = kv.new_sequence(48)
    found = kv.adopt(second, list(range(wanted)), exit_wanted, (0,) * exit_wanted)
    common = min(known // BLOCK, (wanted - 1) // BLOCK) * BLOCK
    depth = min(exit_there, exit_wanted)
    assert second.watermark == [common] * depth + [0] * (FULL - depth)
    assert found == common * depth
    assert max(second.watermark) < wanted
    kv.check_integrity([first, second])


def test_a_chain_ends_where_the_tokens_differ() -> None:
    kv = new_kv()
    first = computed(kv, TOKENS, FULL)
    second = kv.new_sequence(48)
    other = [*TOKENS[:5], 99, *TOKENS[6:]]
    kv.adopt(second, other, FULL, (0,) * FULL)
    assert second.watermark == [4] * FULL
    kv.check_integrity([first, second])


def test_a_shallow_block_is_deepened_beside_what_there_is() -> None:
    kv = new_kv()
    shallow = computed(kv, TOKENS, 2)
    deep = kv.new_sequence(48)
    assert compute(kv, deep, TOKENS, FULL) == 12 * 2
    assert deep.watermark == [14] * FULL
    assert kv.events["shared_block_deepened"] > 0
    third = kv.new_sequence(48)
    assert kv.adopt(third, TOKENS, FULL, (0,) * FULL) == 12 * FULL
    assert (third.table[:3] == deep.table[:3]).all()
    assert shallow.watermark == [14, 14, 0, 0], "the first one is left alone"
    kv.check_integrity([shallow, deep, third])


def test_other_settings_are_refused() -> None:
    kv = new_kv()
    first = computed(kv, TOKENS, FULL, setting=0)
    second = kv.new_sequence(48)
    assert kv.adopt(second, TOKENS, FULL, (1,) * FULL) == 0
    assert kv.events["width_mismatch_refused"] > 0
    # settings of a deeper segment alone: what lies below serves both
    assert kv.adopt(second, TOKENS, FULL, (0, 1, 0, 0)) == 12
    assert second.watermark == [12, 0, 0, 0]
    kv.check_integrity([first, second])


def test_a_mixed_chain_is_neither_published_nor_continued() -> None:
    kv = new_kv()
    mixed = computed(kv, TOKENS[:4], FULL, setting=0)
    compute(kv, mixed, TOKENS, FULL, (1,) * FULL)
    assert len(kv.prefix) == FULL, "the first block alone has one kind of settings"
    whole = computed(kv, TOKENS, FULL, setting=0)
    assert len(kv.prefix) == 3 * FULL
    assert mixed.cells[0][0] is whole.cells[0][0]
    assert mixed.cells[0][1] is not whole.cells[0][1]
    before = kv.events["mixed_chain_refused"]
    kv.free(mixed)  # preempted: its settings are replayed, so it can take the first block alone
    kv.adopt(mixed, TOKENS, FULL, (0,) * FULL)
    assert mixed.watermark == [4] * FULL
    assert kv.events["mixed_chain_refused"] > before
    kv.check_integrity([mixed, whole])


def test_two_that_compute_the_same_end_up_with_one() -> None:
    kv = new_kv()
    first, second = kv.new_sequence(48), kv.new_sequence(48)
    for sequence in (first, second):  # both before anything is published
        assert kv.reserve(sequence, FULL, 14, states=False)
    for sequence in (first, second):
        spans, _ = sequence.spans(FULL, 14, (0,) * FULL, 10**6)
        kv.advance(sequence, TOKENS, FULL, spans, states=False)
    assert (first.table[:3] == second.table[:3]).all()
    assert kv.pool.num_free == 200 - 5 * PER_BLOCK
    kv.check_integrity([first, second])


def test_states_are_adopted() -> None:
    kv = new_kv()
    first = computed(kv, TOKENS, 2, states=True)
    assert (first.resume[:14] == 2).all()
    second = kv.new_sequence(48)
    kv.adopt(second, TOKENS, FULL, (0,) * FULL)
    assert second.watermark == [12, 12, 0, 0]
    assert (second.resume[:12] == 2).all()
    assert (second.resume[12:] == 0).all()
    assert kv.events["states_adopted"] == 3
    spans, cost = second.spans(FULL, 14, (0,) * FULL, 10**6)
    assert [(s.start, s.stop, s.first_segment) for s in spans] == [(0, 12, 2), (12, 14, 0)]
    assert cost == 12 * (6 - 3) + 2 * 6
    kv.check_integrity([first, second])
    kv.free(first)
    kv.free(second)
    kv.make_room(kv.pool.num_pages)
    assert kv.pool.num_free == kv.pool.num_pages


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    kv = KVManager(GEOMETRY, 200, prefix_cache=False)
    first = computed(kv, TOKENS, FULL)
    assert kv.adopt(kv.new_sequence(48), TOKENS, FULL, (0,) * FULL) == 0
    kv.free(first)
    assert kv.pool.num_free == 200


def test_a_filler_that_is_aborted_leaves_nothing() -> None:
    kv = new_kv()
    shallow = computed(kv, TOKENS, 1)
    filler = kv.new_sequence(48)
    kv.adopt(filler, TOKENS, FULL, (0,) * FULL)
    spans, _ = filler.spans(FULL, 14, (0,) * FULL, 3 * 6)  # three rows: no block becomes whole
    assert kv.reserve(filler, FULL, 14, states=False)
    kv.advance(filler, TOKENS, FULL, spans, states=False)
    assert filler.watermark == [12, 3, 3, 3]
    before = len(kv.prefix)
    kv.free(filler)
    assert len(kv.prefix) == before == 3
    kv.check_integrity([shallow])


# ---- reserve


@given(
    num_pages=st.integers(0, 40),
    held=st.integers(0, 12),
    stop=st.integers(1, 16),
    exit=st.integers(1, FULL),
    states=st.booleans(),
)
def test_reserve_is_all_or_nothing(num_pages: int, held: int, stop: int, exit: int, states: bool) -> None:
    kv = new_kv(num_pages)
    sequence = kv.new_sequence(48)
    if held and not kv.reserve(sequence, 1, held, states=False):
        return
    free, cells = kv.pool.num_free, [list(cells) for cells in sequence.cells]
    bound = kv.pages_to_reserve(sequence, exit, stop, states=states)
    done = kv.reserve(sequence, exit, stop, states=states)
    kv.check_integrity([sequence])
    blocks = GEOMETRY.num_blocks(stop)
    if not done:
        assert bound > free
        assert (kv.pool.num_free, [list(cells) for cells in sequence.cells], sequence.states) == (free, cells, {})
    else:
        assert free - kv.pool.num_free <= bound
        assert all(len(sequence.cells[segment]) >= blocks for segment in range(exit))
        kept = {(block, exit) for block in range(blocks)} if states and exit < FULL else set()
        assert set(sequence.states) == kept
        free = kv.pool.num_free
        assert kv.reserve(sequence, exit, stop, states=states), "again: nothing is missing"
        assert kv.pool.num_free == free


# ---- giving back


def test_release_deep_keeps_what_lies_below_and_what_was_recorded() -> None:
    kv = new_kv()
    sequence = computed(kv, TOKENS[:11], 2, states=True)
    compute(kv, sequence, TOKENS[:11], 3, states=True)
    assert (sequence.resume[:11] == 3).all()
    assert {exit for _, exit in sequence.states} == {3}, "states at exit 2 are of no use any more"
    kv.release_deep(sequence, 1)
    assert sequence.watermark == [11, 0, 0, 0]
    assert [len(cells) for cells in sequence.cells] == [3, 0, 0, 0]
    assert not sequence.states
    assert (sequence.resume == 0).all()
    assert (sequence.settings[:3, :11] == 0).all()
    kv.check_integrity([sequence])


def test_states_below_the_release_stay() -> None:
    kv = new_kv()
    sequence = computed(kv, TOKENS, 1, states=True)
    kv.release_deep(sequence, 1)
    assert (sequence.resume[:14] == 1).all()
    assert len(sequence.states) == 4
    kv.drop_states(sequence)
    assert (sequence.resume == 0).all()
    assert not sequence.states
    kv.check_integrity([sequence])


def test_change_settings_drops_what_differs_and_what_lies_above() -> None:
    kv = new_kv()
    sequence = computed(kv, TOKENS, FULL)
    kv.change_settings(sequence, (0, 0, 0, 0), FULL, 14)
    assert sequence.watermark == [14] * FULL
    kv.change_settings(sequence, (0, 0), 2, 14)
    assert sequence.watermark == [14] * FULL, "a change of depth alone drops nothing"
    kv.change_settings(sequence, (0, 0, 1, 0), FULL, 14)
    assert sequence.watermark == [14, 14, 0, 0]
    assert (sequence.settings[:2, :14] == 0).all()
    assert (sequence.settings[2:] == -1).all()
    compute(kv, sequence, TOKENS, FULL, (0, 0, 1, 0))
    assert (sequence.settings[2, :14] == 1).all()
    kv.check_integrity([sequence])
    # published under both, each found by its own settings
    for target, found in (((0, 0, 0, 0), 48), ((0, 0, 1, 0), 48), ((0, 0, 1, 1), 36)):
        assert kv.adopt(kv.new_sequence(48), TOKENS, FULL, target) == found


def test_change_settings_after_preemption_forgets_what_was_recorded() -> None:
    kv = new_kv()
    sequence = computed(kv, TOKENS, FULL)
    kv.free(sequence)
    kv.change_settings(sequence, (1, 0, 0, 0), FULL, 14)
    compute(kv, sequence, TOKENS, FULL, (1, 0, 0, 0))
    assert (sequence.settings[0, :14] == 1).all()


def test_make_room_evicts_only_what_is_wanted() -> None:
    kv = new_kv(4 * PER_BLOCK)
    kv.free(computed(kv, TOKENS, FULL))
    assert kv.pool.num_free == PER_BLOCK
    assert kv.make_room(PER_BLOCK)
    assert kv.events["evicted"] == 0
    assert kv.make_room(PER_BLOCK + 1)
    assert kv.pool.num_free in (PER_BLOCK + 1, PER_BLOCK + 2)  # a segment of two layers owns two pages
    assert kv.make_room(4 * PER_BLOCK)
    assert not kv.make_room(4 * PER_BLOCK + 1)


# ---- integrity


def _lose_a_page(kv: KVManager, sequence: SequenceKV) -> None:
    kv.pool.allocate(1)


def _hold_a_page_twice(kv: KVManager, sequence: SequenceKV) -> None:
    free = kv.pool.allocate(1)
    last = Cell(sequence.cells[0][0].pages)
    assert free is not None
    sequence.put(0, len(sequence.cells[0]), last)


def _one_user_too_many(kv: KVManager, sequence: SequenceKV) -> None:
    sequence.cells[0][0].users += 1


def _a_shared_cell_that_is_private(kv: KVManager, sequence: SequenceKV) -> None:
    other = kv.new_sequence(48)
    other.put(0, 0, sequence.cells[0][-1])
    sequence.cells[0][-1].users += 1
    kv.check_integrity([sequence, other])


def _rising_watermark(kv: KVManager, sequence: SequenceKV) -> None:
    sequence.watermark[1] = sequence.watermark[0]
    sequence.watermark[0] -= 1


def _kv_without_a_page(kv: KVManager, sequence: SequenceKV) -> None:
    sequence.watermark[0] += BLOCK


def _table_out_of_step(kv: KVManager, sequence: SequenceKV) -> None:
    sequence.table[1, 0] += 1


def _forgotten_state(kv: KVManager, sequence: SequenceKV) -> None:
    sequence.states.popitem()


@pytest.mark.parametrize(
    "corrupt",
    [
        _lose_a_page,
        _hold_a_page_twice,
        _one_user_too_many,
        _a_shared_cell_that_is_private,
        _rising_watermark,
        _kv_without_a_page,
        _table_out_of_step,
        _forgotten_state,
    ],
)
def test_integrity_check_sees(corrupt: Callable[[KVManager, SequenceKV], None]) -> None:
    kv = new_kv()
    sequence = computed(kv, TOKENS, 2, states=True)
    kv.check_integrity([sequence])
    with pytest.raises(AssertionError):  # noqa: PT012
        corrupt(kv, sequence)
        kv.check_integrity([sequence])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32).map(random.Random))
def test_integrity_holds_under_random_work(rng: random.Random) -> None:
    kv = new_kv(rng.choice([30, 60, 120]))
    alive: list[tuple[SequenceKV, list[int]]] = []
    for _ in range(40):
        action = rng.choice(["new", "run", "run", "release", "states", "free", "change", "evict"])
        if action == "new" and len(alive) < 4:
            alive.append((kv.new_sequence(24), [*range(rng.choice([0, 8, 13])), *rng.choices(range(3), k=8)]))
        elif action == "evict":
            kv.make_room(kv.pool.num_free + rng.randrange(1, 5))
        elif alive:
            sequence, tokens = rng.choice(alive)
            exit, setting = rng.randrange(1, FULL + 1), rng.randrange(2)
            target = (setting,) * exit
            if action == "run":
                known = rng.randrange(max(1, sequence.watermark[0]), len(tokens) + 1)
                states = rng.random() < 0.5
                kv.adopt(sequence, tokens[:known], exit, target)
                spans, _ = sequence.spans(exit, known, target, rng.randrange(1, 60))
                if spans and kv.reserve(sequence, exit, spans[-1].stop, states=states):
                    kv.advance(sequence, tokens[:known], exit, spans, states=states)
            elif action == "release":
                kv.release_deep(sequence, exit)
            elif action == "states":
                kv.drop_states(sequence)
            elif action == "free":
                kv.free(sequence)
            elif action == "change":
                kv.change_settings(sequence, target, exit, len(tokens))
        kv.check_integrity([sequence for sequence, _ in alive])
    for sequence, _ in alive:
        kv.free(sequence)
    kv.make_room(kv.pool.num_pages)
    assert kv.pool.num_free == kv.pool.num_pages, "everything comes back"
