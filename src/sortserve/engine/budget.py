"""The latency budget of a request, and when its tokens are due."""

import math
from dataclasses import dataclass
from typing import Literal

from sortserve.engine.errors import RequestError

BudgetPolicy = Literal["best-effort", "strict", "cut"]
MAX_BUDGET_MS = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What a client asks for; every constraint given must hold. All in milliseconds.

    `total_ms`: from the last byte of the request to the last token. `ttft_ms`: to the first token. `tpot_ms`: per output
    token after the first. `policy`: `best-effort` serves the floor, late if need be, and says so; `strict` refuses;
    `cut` stops in time. Raises RequestError for a value that is not in (0, 3,600,000], or if nothing is given.
    """

    total_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    policy: BudgetPolicy = "best-effort"

    def __post_init__(self) -> None:
        for name in ("total_ms", "ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_BUDGET_MS:  # NaN is not
                raise RequestError(
                    f"latency budget {name} is {value}, must be over 0 and at most {MAX_BUDGET_MS:.0f} ms",
                    param=f"latency_budget_{name}" if name != "total_ms" else "latency_budget_ms",
                )
        if self.policy not in ("best-effort", "strict", "cut"):
            raise RequestError(
                f"latency budget policy is {self.policy!r}, must be best-effort, strict or cut",
                param="latency_budget_policy",
            )
        if self.total_ms is None and self.ttft_ms is None and self.tpot_ms is None:
            raise RequestError("a budget needs total_ms, ttft_ms or tpot_ms", param="latency_budget_ms")

    def due(self, token_number: int, arrival: float, first_token: float | None, last_number: int) -> float:
        """When output token `token_number` (from 1) is due, in seconds on the clock of `arrival`; inf if never.

        Token k is due at max(first token, TTFT due if given) + (k - 1) x TPOT, the last one (`last_number`, as far as
        is known) also within the total. A first token that came early is credit; without a TTFT constraint the
        clock of the TPOT starts at the first token, `first_token` None meaning it has not come.
        """
        due = math.inf
        ttft_due = arrival + self.ttft_ms / 1e3 if self.ttft_ms is not None else -math.inf
        if token_number == 1:
            due = ttft_due if self.ttft_ms is not None else math.inf
        elif self.tpot_ms is not None:
            started = max(ttft_due, -math.inf if first_token is None else first_token)
            if started > -math.inf:
                due = started + (token_number - 1) * self.tpot_ms / 1e3
        if self.total_ms is not None and token_number >= last_number:
            due = min(due, arrival + self.total_ms / 1e3)
        return due

    def met(self, arrival: float, first_token: float | None, last_token: float | None, num_tokens: int) -> bool:
        """Whether a finished answer kept the budget: first and last token by their due times. One that ended before its
        first token did not; where none was asked for, `within_total` tells."""
        if first_token is None or last_token is None:
            return False
        return first_token <= self.due(1, arrival, None, num_tokens) and last_token <= self.due(
            num_tokens, arrival, first_token, num_tokens
        )

    def within_total(self, arrival: float, end: float) -> bool:
        """Whether `end` is within the total, if one is given: all there is to keep where no token is asked for."""
        return self.total_ms is None or end <= arrival + self.total_ms / 1e3
