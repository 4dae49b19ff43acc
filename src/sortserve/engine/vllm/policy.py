"""The shared policies inside vLLM: they see the same arrays as in our own engine, made of the scheduler's records.

What differs is declared as data: no refill (going deeper means computing the sequence again), nobody sits out, K/V are
always of one sub-model. The costs are learned from the steps themselves: until enough of them ran to fit a table, which
the warm-up's requests see to, nothing is predicted and everybody runs the best that they may.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from sortserve.engine.cost import CostTable, StepCost, StepShape
from sortserve.engine.cost_fit import Measured, fit_table
from sortserve.engine.cost_model import CostModel
from sortserve.engine.estimates import decode_shape
from sortserve.engine.ladder import Ladder
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Policy, Reason, View
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.vllm.deciding import Choice, Record

CAPABILITIES: frozenset[str] = frozenset()
"""Of refill, sit_out and reuse: none of them."""
ASK_EVERY = 8
ASK_SECONDS = 0.25
ENOUGH_STEPS = 48
"""Measured steps that a first table is fitted to; again at twice as many, and so on up to MOST_STEPS."""
MOST_STEPS = 1536
MOST_BUCKET = 128


class LearnedCost:
    """A cost model that comes to be once enough steps ran, and learns from every later one."""

    def __init__(self, rungs: Rungs) -> None:
        self.model: CostModel | None = None
        self._rungs = rungs
        self._measured: list[Measured] = []
        self._next_fit = ENOUGH_STEPS

    @property
    def now(self) -> StepCost:
        """What to price steps with; steps are free before the first fit, so that no deadline seems at risk."""
        return CostTable.free(self._rungs) if self.model is None else self.model

    def note(self, shape: StepShape, seconds: float) -> None:
        """A step ran."""
        if self.model is not None:
            self.model.observe(shape, seconds)
        if len(self._measured) >= MOST_STEPS:
            return
        self._measured.append(Measured(shape, seconds))
        if len(self._measured) == self._next_fit:
            self._next_fit *= 2
            most = max(float(each.shape.rows.max(initial=1.0)) for each in self._measured)
            buckets = [1 << power for power in range(int(min(most, MOST_BUCKET)).bit_length())]
            self.model = CostModel(fit_table(self._rungs.layers, buckets, self._measured))


class PolicyDecider:
    """Asks one of our policies when something happened, and every few steps."""

    def __init__(self, ladder: Ladder, policy: str | Policy, *, step_tokens: int, max_running: int) -> None:
        self.rungs = Rungs.of(ladder, SettingsTable(ladder))
        self.cost = LearnedCost(self.rungs)
        self._policy = make_policy(policy, self.rungs) if isinstance(policy, str) else policy
        self._lengths = AnswerLengths()
        self._step_tokens, self._max_running = step_tokens, max_running
        self._answer: dict[str, Choice] = {}
        self._outputs: dict[str, int] = {}  # output tokens by request, as seen last
        self._steps = 0
        self._until = -np.inf

    def note(self, shape: StepShape, seconds: float) -> None:
        """See Decider."""
        self.cost.note(shape, seconds)

    def decide(self, requests: Sequence[Record], now: float) -> Mapping[str, Choice]:
        """See Decider."""
        seen = {each.request_id: each.num_output for each in requests}
        for gone in self._outputs.keys() - seen.keys():
            if self._outputs[gone]:
                self._lengths.observe(self._outputs[gone])
        news = seen.keys() != self._outputs.keys()
        self._outputs = seen
        self._steps += 1
        if requests and (news or self._steps >= ASK_EVERY or now >= self._until):
            self._steps, self._until = 0, now + ASK_SECONDS
            self._answer = self._ask(self.view(requests, now), requests)
        return self._answer

    def _ask(self, view: View, requests: Sequence[Record]) -> dict[str, Choice]:
        decision = self._policy.decide(view)
        answer = {}
        for row, each in enumerate(requests):
            place, refuse = int(decision.place[row]), bool(decision.refuse[row])
            if place == SITS_OUT:  # refused, or a policy that does not read what we can do: it goes on as it is
                place = each.floor if each.place == NEVER_RAN else each.place
            assert refuse or each.floor <= place <= each.ceiling, "a policy broke a floor or a ceiling"
            late = each.budget is not None and each.budget.policy == "cut" and self._too_late(view, row)
            answer[each.request_id] = Choice(place, Reason(int(decision.reason[row])), refuse, late)
        return answer

    def _too_late(self, view: View, row: int) -> bool:
        """Whether one more token, on the row's place and with everybody else, would come after its total."""
        total = view.arrival[row] + self._total[row]
        counts = np.zeros(len(self.rungs.exits))
        np.add.at(counts, np.where(view.place == NEVER_RAN, view.floor, view.place), 1.0)
        return bool(view.now + float(view.cost.seconds(decode_shape(self.rungs, counts))) > total)

    def view(self, requests: Sequence[Record], now: float) -> View:
        """All requests in arrays."""

        def ints(name: str) -> Ints:
            return np.array([getattr(each, name) for each in requests], np.int64)

        place, num_output = ints("place"), ints("num_output")
        ignore_eos: Bools = np.array([each.ignore_eos for each in requests], np.bool_)
        expected = self._lengths.expected_left_of(num_output, ints("max_tokens") - num_output, ignore_eos)
        arrival = np.array([each.arrival for each in requests])
        self._total = _seconds(requests, "total_ms")
        first, last, upcoming = _due(requests, num_output + expected)
        budgets = [each.budget for each in requests]
        runs = self.rungs.runs[np.maximum(place, 0)] & (place != NEVER_RAN)[:, None]
        return View(
            now=now,
            rungs=self.rungs,
            cost=self.cost.now,
            step_tokens=self._step_tokens,
            max_running=self._max_running,
            capabilities=CAPABILITIES,
            arrival=arrival,
            running=np.array([each.running for each in requests], np.bool_),
            place=place,
            floor=ints("floor"),
            ceiling=ints("ceiling"),
            num_prompt=ints("num_prompt"),
            num_output=num_output,
            expected_left=expected,
            computed=np.where(runs, ints("num_computed")[:, None], 0),
            cached=np.zeros((len(requests), len(self.rungs.exits)), np.int64),
            resumable=np.zeros(len(requests), np.bool_),
            exact=np.ones(len(requests), np.bool_),
            strict=np.array([budget is not None and budget.policy == "strict" for budget in budgets], np.bool_),
            budgeted=np.array([budget is not None for budget in budgets], np.bool_),
            first_due=first,
            last_due=last,
            next_due=upcoming,
            tokens_since_switch=num_output - ints("last_switch"),
            confidence=np.full(len(requests), np.nan),
            steps=max(1, self._steps),
        )


def _seconds(requests: Sequence[Record], name: str) -> Floats:
    """[n] of a budget's constraint; inf where it is not given."""
    found = [None if each.budget is None else getattr(each.budget, name) for each in requests]
    return np.array([np.inf if ms is None else ms / 1e3 for ms in found])


def _due(requests: Sequence[Record], last_number: Ints) -> tuple[Floats, Floats, Floats]:
    """[n] when the first token, the last expected one, and the nearer of the next and the last are due."""
    rows = []
    for each, last in zip(requests, last_number.tolist(), strict=True):
        if each.budget is None:
            rows.append((np.inf, np.inf, np.inf))
            continue

        def due(number: int, each: Record = each, last: int = last) -> float:
            assert each.budget is not None
            return each.budget.due(number, each.arrival, each.first_token, last)

        rows.append((due(1), due(last), min(due(each.num_output + 1), due(last))))
    first, final, upcoming = np.array(rows, np.float64).reshape(-1, 3).T
    return first, final, upcoming
