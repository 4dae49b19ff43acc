"""Planning a step while the one before it runs: its tokens count as known, but for which they are.

Of what a step gives, only the ids matter to the next one (whether somebody stops, what must follow by a grammar), and those
are on the device already: there the next step finds them. So the host can plan and launch it unseen, as long as nobody
needs to look at an id before. Who then turns out to have stopped has run one row in vain; who gets the last token that it
asked for is known to leave, and runs none.
"""

from collections.abc import Mapping

from sortserve.engine.plan import PENDING, Plan
from sortserve.engine.request import Request, owner_of


def can_follow(plan: Plan, requests: Mapping[str, Request]) -> bool:
    """Whether a step can follow before anybody has seen what `plan` gives."""
    owners = (owner_of(part, requests) for part in plan.sequences)
    return all(request is None or request.goes_on_unseen for request in owners)


def expect_tokens(plan: Plan, requests: Mapping[str, Request]) -> list[Request]:
    """Give every request the token that `plan` draws for it, as PENDING; returns those whose last one it is."""
    leaving = []
    for part in plan.sequences:
        request = owner_of(part, requests)
        if part.sample is not None and request is not None:
            request.tokens.append(PENDING)
            if request.tokens_left == 0:
                leaving.append(request)
    return leaving
