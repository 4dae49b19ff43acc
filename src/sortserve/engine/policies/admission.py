"""Who is turned away: shared by all policies that predict, so that they differ in sub-models alone.

A strict request that is predicted to miss its budget is refused, when it comes and as long as it waits. Others that will
miss are served last: they take part only in steps that nobody in time has prompts for, and after `patience_seconds` in a
share of all steps. Requests without a budget have the same share once they waited so long: that is what bounds their wait.
"""

import numpy as np

from sortserve.engine.policies.outlook import Outlook
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, View
from sortserve.engine.rungs import Bools, Ints

PATIENCE_SECONDS = 30.0
SHARE_STEPS = 8
"""One in so many steps is for those that waited longer than the patience; two beyond twice it, four beyond four times."""

SEATS_SHARE = 0.25
"""Of all seats: as many may be kept by those that nothing helps, where others wait for one."""


def refusable(view: View) -> Bools:
    """[n] may still be refused."""
    may: Bools = view.strict & view.budgeted & (view.place == NEVER_RAN)
    return may


def turned_away(outlook: Outlook, late: Bools, hopeless: Bools) -> Bools:
    """[n] the `hopeless` that have not begun, and of those that wait so many as are `late` [n], predicted to miss whatever
    the policy could do, the latest comers first. Of many late ones half are taken, since the others are then less late; the
    next step looks again. Who runs and will miss is no reason to turn others away: their coming was foreseen when it was
    let in.
    """
    view = outlook.view
    away = hopeless & ~view.running
    late = late & view.budgeted & ~view.running & ~away
    if not late.any():
        return away
    last_due = view.next_due[late].max()
    waiting = np.flatnonzero(view.budgeted & ~view.running & ~away & (view.next_due <= last_due))
    newest = waiting[np.argsort(-view.arrival[waiting], kind="stable")]
    away[newest[: (int(late.sum()) + 1) // 2]] = True
    return away


def overdue_turn(view: View, dropped: Bools, decisions: int) -> Bools:
    """[n] who has this step to itself, apart from rows that need one token: nobody in most steps."""
    waits = ~view.budgeted | dropped
    waited = np.where(waits & (view.known - view.computed[:, 0] > 1), view.now - view.arrival, 0.0)
    longest = float(waited.max(initial=0.0))
    if longest <= PATIENCE_SECONDS:
        return np.zeros(len(view), np.bool_)
    doublings = min(int(np.log2(longest / PATIENCE_SECONDS)), 2)
    if decisions % (SHARE_STEPS >> doublings):
        return np.zeros(len(view), np.bool_)
    return waited > PATIENCE_SECONDS


def settle(outlook: Outlook, place: Ints, reason: Ints, dropped: Bools, chunk_tokens: int, decisions: int) -> Decision:
    """The decision, in which the `dropped` ones are refused or served last at the place given for them."""
    view = outlook.view
    refuse = dropped & refusable(view)
    last = dropped & ~refuse
    behind = (outlook.of(outlook.rows, np.maximum(place, 0)) > 1) | ~view.running
    others = ~dropped & (place >= 0)
    place = place.copy()
    if "sit_out" in view.capabilities:
        turn = overdue_turn(view, last, decisions)
        if turn.any():
            place[behind & ~turn] = SITS_OUT
        elif (others & behind & view.budgeted).any():
            # whoever sits out keeps its seat: where many do and others wait, those that only decode must come to an end
            ends = last & view.running & ~behind
            scarce = len(view) > view.max_running and ends.sum() > SEATS_SHARE * view.max_running
            place[last & ~ends if scarce else last] = SITS_OUT
    place[refuse] = SITS_OUT
    return Decision(place, reason, refuse, chunk_tokens)
