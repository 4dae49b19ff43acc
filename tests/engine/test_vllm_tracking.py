"""What vLLM's scheduler keeps of a request: arguments clamped, K/V that may stay, and who shares cached blocks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.settings import SettingsTable
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.engine.vllm.tracking import Tracked, keeps_kv, read_request, salt_of, salts

SHAPE = ModelShape(num_layers=8, hidden_size=4, ffn_width=32, num_heads=1, num_kv_heads=1, head_dim=4, vocab_size=8)
LADDER = Ladder.of(
    SHAPE,
    [
        Entry("d4", SubModel.make(4, 32)),
        Entry("d4-narrow", SubModel.make(4, 16)),
        Entry("d8-narrow", SubModel.make(8, 16)),
        Entry("d8-skip", SubModel.make(8, 32, skip_attention=[6])),
    ],
)
SETTINGS = SettingsTable(LADDER)
NOW = 1_700_000_000.0, 500.0  # time.time(), time.monotonic()


def read(arguments: dict[str, Any] | None) -> Tracked:
    return read_request(arguments, LADDER, NOW[0] - 1, NOW, None)


def place(name: str) -> int:
    return LADDER.place(name)


def test_what_the_front_end_sends_is_understood() -> None:
    tracked = read(
        {
            "sortserve_floor": "d4",
            "sortserve_ceiling": "d8-skip",
            "sortserve_budget": [-1, 50, 2000],
            "sortserve_slo": "cut",
            "sortserve_arrival": NOW[0] - 3,
        }
    )
    assert (tracked.floor, tracked.ceiling, tracked.pinned) == (place("d4"), place("d8-skip"), False)
    assert tracked.budget is not None
    assert (tracked.budget.ttft_ms, tracked.budget.tpot_ms, tracked.budget.total_ms) == (None, 50, 2000)
    assert tracked.budget.policy == "cut"
    assert not tracked.exact, "a budget without a pin may reuse K/V"
    assert tracked.arrival == NOW[1] - 3
    pinned = read({"sortserve_submodel": "d4", "sortserve_kv": "reuse"})
    assert (pinned.floor, pinned.ceiling, pinned.pinned, pinned.exact) == (place("d4"), place("d4"), True, False)
    assert read(None).ceiling == LADDER.full
    assert read(None).exact
    assert read(None).arrival == NOW[1] - 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ad48-", max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=2),
    max_leaves=6,
)
KEYS = [f"sortserve_{name}" for name in ("submodel", "floor", "ceiling", "budget", "slo", "kv", "arrival")]


@given(st.dictionaries(st.sampled_from(KEYS), anything))
def test_nothing_that_is_sent_raises(arguments: dict[str, Any]) -> None:
    tracked = read(arguments)
    assert 0 <= tracked.floor <= tracked.ceiling <= LADDER.full
    assert tracked.arrival <= NOW[1]


@pytest.mark.parametrize(
    ("used", "wanted", "exact", "keeps"),
    [
        (["d8"], "d4", True, True),  # shallower, and alike below
        (["d8-narrow"], "d4-narrow", True, True),
        (["d8-skip"], "d4", True, True),  # what it skips is above
        (["d4"], "d8", True, False),
        (["d4"], "d8", False, False),  # nobody has K/V there
        (["d8", "d4"], "d8", True, False),  # in between it was shallower
        (["d8"], "d8-narrow", True, False),
        (["d8"], "d8-narrow", False, True),
        (["d8", "d8-narrow"], "d8", True, False),
        ([], "d8", True, True),
    ],
)
def test_kv_stay_where_they_are_good_for_the_next_place(used: list[str], wanted: str, exact: bool, keeps: bool) -> None:
    tracked = read(None)
    tracked.exact = exact
    tracked.used = {place(name) for name in used}
    assert keeps_kv(tracked, place(wanted), SETTINGS) == keeps


def salt(wanted: str, used: list[str], request_id: str = "a", own: str | None = None) -> str:
    tracked = read(None)
    tracked.user_salt, tracked.wanted, tracked.used = own, place(wanted), {place(name) for name in used}
    return salt_of(tracked, request_id, salts(LADDER), SETTINGS)


def test_blocks_are_shared_among_requests_of_one_submodel() -> None:
    assert len({salt(entry.id, []) for entry in LADDER.entries}) == len(LADDER.entries)
    assert salt("d8", [], "a") == salt("d8", ["d8"], "b")
    assert salt("d4", ["d8"], "a") == salt("d4", [], "b"), "what a deeper one made below is the same"
    assert salt("d8", [], own="x") != salt("d8", [])


def test_kv_of_several_widths_are_shared_with_nobody() -> None:
    assert salt("d8-narrow", ["d8"], "a") != salt("d8-narrow", [], "a")
    assert salt("d8-narrow", ["d8"], "a") != salt("d8-narrow", ["d8"], "b")
