"""Which sub-model each request runs next: one small protocol, several policies.

A policy reads requests, the ladder and predicted step times, and answers with a place in the ladder and a reason for
each request, never below its floor nor above its ceiling. The scheduler does the rest.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sortserve.engine.ladder import Ladder
from sortserve.engine.predictor import StepTimes
from sortserve.engine.request import NEVER_RAN, Request
from sortserve.engine.settings import SettingsTable

Reason = Literal["best", "pinned", "fixed", "deadline", "others", "memory", "hold"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A place in the ladder, or None to sit this step out, and why."""

    place: int | None
    reason: Reason


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may know. `expected_tokens[i]`: output tokens that request i is expected to still produce."""

    now: float
    requests: Sequence[Request]
    expected_tokens: Sequence[int]
    ladder: Ladder
    settings: SettingsTable
    times: StepTimes | None  # None before warm-up
    time_factor: float  # correction of `times`
    chunk_tokens: int  # prompt tokens that one step takes


class Policy(Protocol):
    """Chooses; holds no reference to requests between calls."""

    name: str

    def decide(self, view: View) -> list[Choice]:
        """One choice per request of the view, in its order."""
        ...


class FixedPolicy:
    """Every request runs one place of the ladder, within its floor and ceiling: what engines without sub-models do."""

    name = "fixed"

    def __init__(self, place: int) -> None:
        self._place = place

    def decide(self, view: View) -> list[Choice]:
        """The fixed place, clamped."""
        return [
            Choice(min(max(self._place, request.floor), request.ceiling), "fixed")
            if request.floor < request.ceiling
            else Choice(request.floor, "pinned")
            for request in view.requests
        ]


class SlackPolicy:
    """The highest cap on the ladder under which the most deadlines are predicted to be kept.

    Step time follows the deepest and widest row, so the unit of choice is the step's shape: for each cap, the time of a
    step with all requests at most there, and from it when each request would finish. Rising again must be predicted to
    keep every deadline with `margin` to spare, refill included, and waits `hold_tokens` output tokens after a switch.
    """

    name = "slack"

    def __init__(self, margin: float = 1.25, safety: float = 1.05, hold_tokens: int = 8) -> None:
        self._margin = margin
        self._safety = safety
        self._hold_tokens = hold_tokens

    def decide(self, view: View) -> list[Choice]:
        """See the class."""
        budgeted = [place for place, request in enumerate(view.requests) if request.asked.budget is not None]
        if view.times is None or not budgeted:
            highest = [self._allowed(view, request, view.ladder.full)[-1] for request in view.requests]
            return [Choice(at, _reason(request, at)) for request, at in zip(view.requests, highest, strict=True)]
        cap = self._best_cap(view, budgeted, self._safety)
        held = max(view.requests[i].submodel for i in budgeted)
        if NEVER_RAN < held < cap:
            cap = max(held, self._best_cap(view, budgeted, self._margin))
        choices = []
        for request, expected in zip(view.requests, view.expected_tokens, strict=True):
            place = self._own_best(view, request, expected, cap)
            if place > request.submodel > NEVER_RAN and request.num_output - request.last_switch < self._hold_tokens:
                choices.append(Choice(request.submodel, "hold"))
            else:
                choices.append(Choice(place, _reason(request, place)))
        return choices

    def _allowed(self, view: View, request: Request, cap: int) -> list[int]:
        """Places under a cap, ascending. With exact K/V the widths chosen first stay."""
        highest = max(request.floor, min(cap, request.ceiling))
        if request.kv_mode == "exact" and request.submodel > NEVER_RAN and request.floor < request.ceiling:
            same = view.settings.compatible(request.submodel)
            return [place for place in same if request.floor <= place <= highest] or [request.submodel]
        return list(range(request.floor, highest + 1))

    def _own_best(self, view: View, request: Request, expected: int, cap: int) -> int:
        """The highest place under the cap on which the request itself is in time; its floor if it is late on all, so
        that nobody works on more layers for an answer that is late anyway."""
        allowed = self._allowed(view, request, cap)
        if request.asked.budget is None or view.times is None:
            return allowed[-1]
        for place in reversed(allowed):
            step = view.times.step([(place, len(view.requests))]) * view.time_factor
            if self._lateness(view, request, expected, place, step) <= 0:
                return place
        return allowed[0]

    def _best_cap(self, view: View, budgeted: Sequence[int], margin: float) -> int:
        """The highest cap with the fewest late requests, predicted times taken `margin` times."""
        assert view.times is not None
        best, fewest = 0, len(budgeted) + 1
        for cap in range(view.ladder.full, -1, -1):
            places = [self._allowed(view, request, cap)[-1] for request in view.requests]
            step = view.times.step(Counter(places).items()) * view.time_factor * margin
            late = sum(
                self._lateness(view, view.requests[i], view.expected_tokens[i], places[i], step, margin) > 0
                for i in budgeted
            )
            if late < fewest:
                best, fewest = cap, late
            if late == 0:
                break
        return best

    def _lateness(
        self, view: View, request: Request, expected: int, place: int, step: float, margin: float = 1.0
    ) -> float:
        """Seconds by which the request's worst deadline is predicted to be missed; negative is slack."""
        assert view.times is not None
        assert request.asked.budget is not None
        exit = view.settings.exits[place]
        rows = len(request.tokens) - request.kv.watermark[exit - 1]
        first = view.times.prefill(place, rows, view.chunk_tokens) * view.time_factor * margin if rows > 1 else step
        budget, arrival = request.asked.budget, request.asked.arrival
        last = request.num_output + expected
        first_at = view.now + first
        began = request.first_token if request.first_token is not None else first_at
        lateness = first_at - budget.due(request.num_output + 1, arrival, began, last)
        return max(lateness, first_at + step * (expected - 1) - budget.due(last, arrival, began, last))


def _reason(request: Request, place: int) -> Reason:
    if request.floor == request.ceiling:
        return "pinned" if request.asked.submodel != "auto" else "best"
    if place == request.ceiling:
        return "best"
    return "deadline" if request.asked.budget is not None else "others"


def make_policy(name: str, ladder: Ladder, fixed_place: int | None = None) -> Policy:
    """A policy by name; raises ValueError listing the names there are."""
    if name == "fixed":
        return FixedPolicy(ladder.full if fixed_place is None else fixed_place)
    if name == "slack":
        return SlackPolicy()
    raise ValueError(f"no policy {name!r}; there are: fixed, slack")
