"""The shared policies inside vLLM: they see the same arrays as in our own engine, made of what its scheduler knows.

What differs is declared as data: no refill (going deeper means computing the sequence again) and nobody sits out. The costs
are learned from the steps themselves; until enough of them ran, which the warm-up's requests see to, nothing is predicted
and everybody runs the best that they may. No vLLM here, and no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sortserve.engine.cost_file import encode_cost
from sortserve.engine.errors import StartupError
from sortserve.engine.estimates import decode_shape
from sortserve.engine.foretelling import Foreteller
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Policy, View
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs
from sortserve.engine.vllm.deciding import CAPABILITIES, Answer, MeasuredStep, Setup, Standing
from sortserve.engine.vllm.learned import LearnedCost, shape_of

FACTORY = "sortserve.engine.vllm.policy:policy_decider"
ASK_EVERY = 8
"""Steps after which the policy is asked even if nothing happened, as in our own engine (`engine/deciding.py`)."""
ASK_SECONDS = 0.25
CUT_RESERVE_SECONDS = 0.004
"""Kept back by the `cut` policy for the way to the socket, which has a process more than the native engine's."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a change of asks the policy anew."""

    prompt_left: bool
    running: bool
    begun: bool = False


class PolicyDecider:
    """Asks one of our policies when something happened, and every few steps."""

    def __init__(self, setup: Setup, policy: Policy, *, chunks: bool = True) -> None:
        """`chunks`: let the policy limit the rows of prompts in a step."""
        self.rungs = Rungs.of(setup.ladder, setup.settings)
        self.cost = LearnedCost(self.rungs)
        self._setup, self._policy, self._chunks = setup, policy, chunks
        self._lengths = AnswerLengths()
        self._foreteller = Foreteller()
        self._foretold: dict[str, tuple[float, float]] = {}  # by request: when it was last, and seconds from then
        self._answer = Answer()
        self._seen: dict[str, _Seen] = {}
        self._steps = 0
        self._until = -np.inf

    def measured(self, step: MeasuredStep) -> None:
        """See Decider."""
        self.cost.note(shape_of(self.rungs, step), step.seconds, step.between)

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        """See Decider."""
        self._lengths.observe(num_output)
        asked_at, seconds = self._foretold.pop(request_id, (now, 0.0))
        self._foreteller.ended(seconds, now - asked_at)

    def stats(self) -> Mapping[str, Any]:
        """What the front end predicts with, and how good predictions were: JSON of the costs, and errors by kind of step."""
        model = self.cost.model
        if model is None or self.cost.table is None:
            return {"steps": self.cost.steps}
        errors = {kind: [each.steps, each.median, each.covered] for kind, each in model.errors().items()}
        return {"steps": self.cost.steps, "cost": encode_cost(self.cost.table), "errors": errors}

    def decide(self, requests: Sequence[Standing], now: float) -> Answer:
        """See Decider."""
        news = self._look(requests, now)
        self._steps += 1
        if requests and (news or self._steps >= ASK_EVERY or now >= self._until):
            view = self.view(requests, now)
            self._answer = self._ask(view, requests)
            self._steps, self._until = 0, now + ASK_SECONDS
        late = self._too_late(requests, now)
        if late:
            return replace(self._answer, cut=late)
        return self._answer

    def _look(self, requests: Sequence[Standing], now: float) -> bool:
        """Note who is there; whether somebody came, went, began, or was preempted."""
        seen = {
            each.request_id: _Seen(
                each.num_computed < each.num_prompt + each.num_output - 1,
                each.running,
                each.place != NEVER_RAN,
            )
            for each in requests
        }
        for gone in self._seen.keys() - seen.keys():
            self._foretold.pop(gone, None)
        before, self._seen = self._seen, seen
        for each in requests:
            was = before.get(each.request_id)
            if each.place != NEVER_RAN and (was is None or not was.begun):
                self._foreteller.traffic.note(now, each.num_prompt - each.num_cached)
        if before.keys() != seen.keys():
            return True
        return any(
            (each.prompt_left, each.running) != (before[name].prompt_left, before[name].running)
            for name, each in seen.items()
        )

    def _ask(self, view: View, requests: Sequence[Standing]) -> Answer:
        decision: Decision = self._policy.decide(view)
        # who is turned away but may not be refused, by a policy that does not read what we can do: goes on as it is
        stays = np.where(view.place == NEVER_RAN, view.floor, view.place)
        place = np.where(decision.place == SITS_OUT, stays, decision.place)
        assert ((place >= view.floor) & (place <= view.ceiling)).all(), "a policy broke a floor or a ceiling"
        refused = [each.request_id for each, refuse in zip(requests, decision.refuse, strict=True) if refuse]
        names = [each.request_id for each in requests]
        return Answer(
            dict(zip(names, place.tolist(), strict=True)),
            dict(zip(names, decision.reason.tolist(), strict=True)),
            frozenset(refused),
            chunk_tokens=max(1, decision.chunk_tokens) if self._chunks else None,
            foretold=self._foretell(view, requests, place, decision.chunk_tokens),
            order=tuple(names[number] for number in view.order.tolist()),
        )

    def _foretell(
        self, view: View, requests: Sequence[Standing], place: Ints, chunk_tokens: int
    ) -> dict[str, tuple[float, bool]]:
        """See Answer.foretold."""
        new = np.flatnonzero(view.budgeted & (view.place == NEVER_RAN)).tolist()
        told: dict[str, tuple[float, bool]] = {}
        if not new or self.cost.model is None:
            return told
        first, last = self._foreteller.foretell(view, place, chunk_tokens)
        for row in new:
            each = requests[row]
            assert each.budget is not None
            coming, expected = (float(first[row]), float(last[row])), each.num_output + int(view.expected_left[row])
            told[each.request_id] = self._foreteller.told(each.budget, each.arrival, view.now, coming, expected)
            self._foretold[each.request_id] = view.now, coming[1]
        return told

    def _too_late(self, requests: Sequence[Standing], now: float) -> frozenset[str]:
        """Those under the `cut` policy whose next token, with everybody else's, would come after their total."""
        asked = [
            each
            for each in requests
            if each.budget is not None and each.budget.policy == "cut" and each.budget.total_ms is not None
        ]
        if not asked:
            return frozenset()
        counts = np.zeros(len(self.rungs.exits))
        for each in requests:
            if each.running:
                counts[max(each.place, 0)] += 1.0
        context = float(np.mean([each.num_prompt + each.num_output for each in requests]))
        late = set()
        for each in asked:
            assert each.budget is not None
            assert each.budget.total_ms is not None
            due = each.arrival + each.budget.total_ms / 1e3
            alone = np.eye(len(counts))[max(each.place, each.floor)]
            step = float(
                self.cost.now.p90(decode_shape(self.rungs, counts if each.running else counts + alone, context))
            )
            if now + step + CUT_RESERVE_SECONDS > due:
                late.add(each.request_id)
        return frozenset(late)

    def view(self, requests: Sequence[Standing], now: float) -> View:
        """All requests in arrays."""

        def ints(name: str) -> Ints:
            return np.array([getattr(each, name) for each in requests], np.int64)

        def flags(name: str) -> Bools:
            return np.array([getattr(each, name) for each in requests], np.bool_)

        place, num_output = ints("place"), ints("num_output")
        expected = self._lengths.expected_left_of(num_output, ints("max_tokens") - num_output, flags("ignore_eos"))
        first, last, upcoming = _due(requests, num_output + expected)
        budgets = [each.budget for each in requests]
        return View(
            now=now,
            rungs=self.rungs,
            cost=self.cost.now,
            step_tokens=self._setup.step_tokens,
            max_running=self._setup.max_running,
            capabilities=CAPABILITIES,
            arrival=np.array([each.arrival for each in requests]),
            running=flags("running"),
            place=place,
            floor=ints("floor"),
            ceiling=ints("ceiling"),
            num_prompt=ints("num_prompt"),
            num_output=num_output,
            expected_left=expected,
            computed=self._computed(requests),
            cached=np.zeros((len(requests), len(self.rungs.exits)), np.int64),
            resumable=np.zeros(len(requests), np.bool_),
            exact=flags("exact"),
            strict=np.array([budget is not None and budget.policy == "strict" for budget in budgets], np.bool_),
            budgeted=np.array([budget is not None for budget in budgets], np.bool_),
            first_due=first,
            last_due=last,
            next_due=upcoming,
            tokens_since_switch=ints("tokens_since_switch"),
            confidence=np.full(len(requests), np.nan),
            starts=self._foreteller.traffic.rate(now),
            start_rows=self._foreteller.traffic.rows,
        )

    def _computed(self, requests: Sequence[Standing]) -> Ints:
        """[n, segments] tokens with K/V: as deep as the shallowest place that made some of them."""
        depth = np.array(
            [min((self.rungs.exits[place] for place in each.used), default=0) for each in requests], np.int64
        )
        tokens = np.array([each.num_computed for each in requests], np.int64)
        return np.where(np.arange(self.rungs.num_segments) < depth[:, None], tokens[:, None], 0)


def policy_decider(setup: Setup) -> PolicyDecider:
    """For vLLM's scheduler. Options: `policy`, a name; `submodel`, an id, for the policy `fixed`. Raises StartupError."""
    name, pinned = setup.options.get("policy", "slack"), setup.options.get("submodel")
    options = {} if pinned is None else {"place": setup.ladder.place(pinned)}
    try:
        return PolicyDecider(setup, make_policy(name, Rungs.of(setup.ladder, setup.settings), **options))
    except ValueError as error:
        raise StartupError(str(error), param="policy") from error


def _due(requests: Sequence[Standing], last_number: Ints) -> tuple[Floats, Floats, Floats]:
    """[n] when the first token, the last expected one, and the nearer of the next and the last are due."""
    rows = []
    for each, last in zip(requests, last_number.tolist(), strict=True):
        budget = each.budget
        if budget is None:
            rows.append((np.inf, np.inf, np.inf))
            continue
        first, final, upcoming = (
            budget.due(number, each.arrival, each.first_token, last) for number in (1, last, each.num_output + 1)
        )
        rows.append((first, final, min(upcoming, final)))
    first_due, last_due, next_due = np.array(rows, np.float64).reshape(-1, 3).T
    return first_due, last_due, next_due
