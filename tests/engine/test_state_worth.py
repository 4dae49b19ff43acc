"""Whether exit states are kept follows from how many tokens are deepened later."""

import numpy as np

from sortserve.engine.plan import SequencePlan, Span
from sortserve.engine.state_worth import StateWorth


def part(start: int, stop: int, exit: int, computed: int = 0) -> SequencePlan:
    """A request's rows [start, stop) to `exit` of 4; `computed` tokens have K/V in the first segment."""
    span = Span(start, stop, 0, exit, (0,) * exit)
    pages = np.zeros((1, 4), np.int32)
    return SequencePlan("r", 0, exit, (span,), range(stop), (computed,) * exit, pages, {}, True, None)


def test_states_that_nobody_resumes_from_stop_being_kept_shallow_ones_first() -> None:
    worth = StateWorth(4)
    assert worth.pays(1)
    for _ in range(8):
        worth.note(part(0, 256, 1))
    assert not worth.pays(2), "2,048 tokens at depth 2 and none deepened"
    assert worth.pays(12)
    for _ in range(40):
        worth.note(part(0, 256, 1))
    assert not worth.pays(12)


def test_refills_bring_them_back() -> None:
    worth = StateWorth(4)
    for _ in range(40):
        worth.note(part(0, 256, 1))
    assert not worth.pays(4)
    for _ in range(10):
        worth.note(part(0, 256, 4, computed=256))
    assert worth.pays(4)


def test_full_depth_says_nothing() -> None:
    worth = StateWorth(4)
    for _ in range(100):
        worth.note(part(0, 256, 4))
    assert worth.pays(1)
