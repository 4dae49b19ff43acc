"""What policies need to know of all requests alive, in arrays: one row per request, in the order of their arrival here.

What never changes is kept; what does change is read from the requests when a view is asked for, which is at events and
every few steps, not at each of them.
"""

from collections.abc import Collection

import numpy as np

from sortserve.engine.cost import StepCost
from sortserve.engine.kv import KVManager
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.policies.protocol import NEVER_RAN, View
from sortserve.engine.request import Request
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.traffic import Traffic

_CONSTANTS = np.dtype(
    [
        ("arrival", np.float64),
        ("num_prompt", np.int64),
        ("max_tokens", np.int64),
        ("ignore_eos", np.bool_),
        ("exact", np.bool_),
        ("strict", np.bool_),
        ("budgeted", np.bool_),
        ("ttft", np.float64),  # seconds; inf where not asked for
        ("tpot", np.float64),
        ("total", np.float64),
    ]
)
MOST_LOOKUPS = 8
"""Waiting requests whose cached prefixes are looked up anew for one view: each takes some 20 us."""


class RequestTable:
    """Rows of all requests alive. Row i of a view is the i-th request added and not yet removed."""

    def __init__(self, rungs: Rungs, kv: KVManager, settings: SettingsTable) -> None:
        self.requests: list[Request] = []
        self._rungs = rungs
        self._kv = kv
        self._settings = settings
        self._constants = np.zeros(64, _CONSTANTS)
        self._cached = np.zeros((64, len(rungs.exits)), np.int64)
        self._looked_up = np.zeros(64, np.int64)  # version of the prefix index at the last look-up, -1: never
        self.decided: Ints = np.zeros(64, np.int64)  # what the policy answered last
        self.reasons: Ints = np.zeros(64, np.int64)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        """One more row."""
        row = len(self.requests)
        if row == len(self._constants):
            for name in ("_constants", "_cached", "_looked_up", "decided", "reasons"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        asked, budget = request.asked, request.asked.budget

        def seconds(ms: float | None) -> float:
            return np.inf if ms is None else ms / 1e3

        self._constants[row] = (
            asked.arrival,
            len(asked.prompt),
            asked.sampling.max_tokens,
            asked.sampling.ignore_eos,
            request.kv_mode == "exact",
            budget is not None and budget.policy == "strict",
            budget is not None,
            *((np.inf,) * 3 if budget is None else map(seconds, (budget.ttft_ms, budget.tpot_ms, budget.total_ms))),
        )
        self._looked_up[row] = -1
        self.decided[row] = NEVER_RAN
        self.requests.append(request)

    def remove(self, request: Request) -> None:
        """The row goes, later ones move up: views made before hold copies."""
        row, last = self.requests.index(request), len(self.requests) - 1
        for column in (self._constants, self._cached, self._looked_up, self.decided, self.reasons):
            column[row:last] = column[row + 1 : last + 1]
        del self.requests[row]

    def view(
        self,
        now: float,
        cost: StepCost,
        lengths: AnswerLengths,
        step_tokens: int,
        max_running: int,
        features: frozenset[str],
        coming: Collection[str] = (),
        traffic: Traffic | None = None,
    ) -> View:
        """All requests at this moment. Those named `coming` get a token from the step that runs until then."""
        count, segments = len(self.requests), self._rungs.num_segments
        known = self._constants[:count].copy()
        moving = self._moving(coming)
        first_token, confidence = self._marks()
        first_token = np.where(np.isnan(first_token) & (moving[:, 4] > 0), now, first_token)
        num_output = moving[:, 4]
        tokens_left = known["max_tokens"] - num_output
        expected = lengths.expected_left_of(num_output, tokens_left, known["ignore_eos"])
        due = _due(known, num_output, expected, first_token)
        place = moving[:, 1]
        self._look_up(place)
        return View(
            now=now,
            rungs=self._rungs,
            cost=cost,
            step_tokens=step_tokens,
            max_running=max_running,
            capabilities=features,
            arrival=known["arrival"],
            running=moving[:, 0].astype(np.bool_),
            place=place,
            floor=moving[:, 2],
            ceiling=moving[:, 3],
            num_prompt=known["num_prompt"],
            num_output=num_output,
            expected_left=expected,
            computed=moving[:, 7 : 7 + segments],
            cached=self._cached[:count].copy(),
            resumable=moving[:, 6].astype(np.bool_),
            exact=known["exact"],
            strict=known["strict"],
            budgeted=known["budgeted"],
            first_due=due[0],
            last_due=due[1],
            next_due=due[2],
            tokens_since_switch=num_output - moving[:, 5],
            confidence=confidence,
            within=self._within(),
            starts=0.0 if traffic is None else traffic.rate(now),
            start_rows=0.0 if traffic is None else traffic.rows,
        )

    def _moving(self, coming: Collection[str]) -> Ints:
        """[n, 7 + segments] running, place, floor, ceiling, output tokens, last switch, resumable, watermarks."""
        rows = [
            (
                request.running,
                request.submodel,
                request.floor,
                request.ceiling,
                len(request.tokens) - len(request.asked.prompt) + (request.asked.request_id in coming),
                request.last_switch,
                request.keeps_states and request.kv.resumes,
                *request.kv.watermark,
            )
            for request in self.requests
        ]
        return np.array(rows, np.int64).reshape(len(rows), 7 + self._rungs.num_segments)

    def _marks(self) -> tuple[Floats, Floats]:
        """[n] time of the first token, and confidence of the last one; NaN where there is none."""
        none = float("nan")
        firsts = [none if request.first_token is None else request.first_token for request in self.requests]
        return np.array(firsts), np.array([request.confidence for request in self.requests], np.float64)

    def _within(self) -> Floats | None:
        """[n, exits] what the depth head said, NaN of whom it said nothing; None where it said nothing of anybody."""
        told = [request.within for request in self.requests]
        if not any(told):
            return None
        unknown = (float("nan"),) * self._rungs.num_segments
        return np.array([unknown if each is None else each for each in told])

    def _look_up(self, place: Ints) -> None:
        """What the prefix cache holds for requests that have not run, for those looked up longest ago."""
        version = self._kv.prefix.version
        stale = np.flatnonzero((place == NEVER_RAN) & (self._looked_up[: len(place)] != version))
        unknown = stale[self._looked_up[stale] < 0]
        again = stale[np.argsort(self._looked_up[stale], kind="stable")][:MOST_LOOKUPS]
        for row in {*unknown.tolist(), *again.tolist()}:
            request = self.requests[row]
            if request.asked.sampling.prompt_logprobs is None:  # else every row of the prompt must run
                self._cached[row] = cached_tokens(self._kv, request, self._settings)
            else:
                self._cached[row] = 0
            self._looked_up[row] = version


def cached_tokens(kv: KVManager, request: Request, settings: SettingsTable) -> list[int]:
    """By place: tokens at the start of the request that the prefix cache holds up to that place's exit."""
    found: dict[tuple[int, ...], int] = {}

    def held(below: tuple[int, ...]) -> int:
        if below not in found:
            limit = held(below[:-1]) if len(below) > 1 else len(request.tokens) - 1
            found[below] = kv.cached_tokens(request.kv, request.tokens, below, limit)
        return found[below]

    return [held(target) for target in settings.targets]


def _due(
    known: np.ndarray[tuple[int], np.dtype[np.void]], num_output: Ints, expected: Ints, first_token: Floats
) -> tuple[Floats, Floats, Floats]:
    """[n] when the first token, the last expected one, and the nearest of the next and the last are due; `Budget.due`
    in arrays."""
    first_due: Floats = known["arrival"] + known["ttft"]
    total_due: Floats = known["arrival"] + known["total"]
    began = np.where(np.isnan(first_token), -np.inf, first_token)
    started = np.maximum(np.where(np.isfinite(first_due), first_due, -np.inf), began)
    paced: Bools = np.isfinite(known["tpot"]) & np.isfinite(started)

    def due(number: Ints) -> Floats:
        with np.errstate(invalid="ignore"):  # -inf + inf, where it does not count
            later = np.where(paced, started + (number - 1) * known["tpot"], np.inf)
        return np.where(number == 1, first_due, later)

    last = num_output + expected
    last_due = np.minimum(due(last), total_due)
    return np.where(last == 1, last_due, first_due), last_due, np.minimum(due(num_output + 1), last_due)
