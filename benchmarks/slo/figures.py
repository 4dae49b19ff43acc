"""The benchmark's arithmetic: from what came back to attainment, goodput, quality, latencies, and whether a run counts.

Attainment: share of the requests with a budget that kept it; refused and unfinished ones did not. Goodput: quality of
those that kept it, summed, per second of the replay. Both by two clocks: the server's (`sortserve.met`), and the
client's, from the moment the request was due to the moment text was read.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.slo.wire import Outcome
from sortserve.engine.budget import Budget

MOST_LAG_SECONDS = 0.005
"""A run is void if the client sent 1 % of its requests later than this."""
WINDOW_SECONDS = 30.0
_LEAST_IN_WINDOW = 20  # requests with a budget; a window of fewer says nothing


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one request. Seconds by the client's clock; None where it did not happen."""

    kind: str  # interactive, relaxed, none
    due: float  # from the start of the replay
    lag: float  # sent - due
    refused: bool = False  # by the server, with a 4xx
    complete: bool = False
    met: bool = False  # the server's word
    met_by_client: bool = False
    quality: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    total: float | None = None
    predicted_error: float | None = None  # (predicted - taken) / taken, by the server's clock
    switches: int = 0
    refilled: int = 0

    @property
    def budgeted(self) -> bool:
        """Whether there was a budget to keep."""
        return self.kind != "none"


def answered(
    outcome: Outcome, kind: str, budget: Budget | None, quality_of: Callable[[Mapping[str, int]], float | None]
) -> Answered:
    """One request's figures; `quality_of`: of an answer, from its tokens by sub-model."""
    lag = outcome.sent - outcome.due
    told = _told(outcome.tail) if outcome.complete else None
    if told is None:  # refused, broken, given up, or an error after the 200
        return Answered(kind, outcome.due, lag, refused=400 <= outcome.status < 500)
    tokens = sum(told["submodels"].values())
    total = outcome.last - outcome.due
    by_client = budget is not None and budget.met(outcome.due, outcome.first, outcome.last, tokens)
    predicted, taken = outcome.headers.get("x-latency-predicted-ms"), told["elapsed_ms"]
    return Answered(
        kind,
        outcome.due,
        lag,
        complete=True,
        met=bool(told["met"]),
        met_by_client=by_client,
        quality=quality_of(told["submodels"]),
        ttft=outcome.first - outcome.due,
        tpot=(outcome.last - outcome.first) / (tokens - 1) if tokens > 1 else None,
        total=total,
        predicted_error=None if predicted is None or not taken else (float(predicted) - taken) / taken,
        switches=told["switches"],
        refilled=told["refilled_tokens"],
    )


def _told(tail: bytes) -> dict[str, Any] | None:
    """The `sortserve` object of a stream's usage chunk; None if the stream ended in an error."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and b'"sortserve":' in line:
            found: dict[str, Any] = json.loads(line[6:])["sortserve"]
            return found
    return None


def attainment(requests: Iterable[Answered], *, by_client: bool = False) -> float | None:
    """Share of the requests with a budget that kept it; None without any."""
    kept = [request.met_by_client if by_client else request.met for request in requests if request.budgeted]
    return sum(kept) / len(kept) if kept else None


def worst_window(requests: Sequence[Answered], seconds: float, window: float = WINDOW_SECONDS) -> float | None:
    """The lowest attainment of any `window` seconds of a replay of `seconds`, by when requests were due. None if none is
    full; a replay shorter than a window is one."""
    budgeted = sorted((request.due, request.met) for request in requests if request.budgeted)
    due = np.array([moment for moment, _ in budgeted])
    met = np.concatenate([[0], np.cumsum([kept for _, kept in budgeted])])
    if len(due) < _LEAST_IN_WINDOW:
        return None
    if seconds <= window:
        return float(met[-1] / len(due))
    # what is inside changes only where a request leaves or enters: windows that begin or end at one, and the last one
    starts = np.concatenate([due, due - window, [seconds - window]])
    starts = starts[(starts >= 0) & (starts <= seconds - window)]
    first, past = np.searchsorted(due, starts, "left"), np.searchsorted(due, starts + window, "left")
    full = past - first >= _LEAST_IN_WINDOW
    shares = (met[past] - met[first])[full] / (past - first)[full]
    return float(shares.min()) if len(shares) else None


def goodput(requests: Iterable[Answered], seconds: float, *, by_client: bool = False) -> float:
    """Quality of the answers in time, summed, per second."""
    worth = (
        request.quality
        for request in requests
        if request.budgeted and request.quality is not None and (request.met_by_client if by_client else request.met)
    )
    return sum(worth) / seconds


def mean_quality(requests: Iterable[Answered]) -> float | None:
    """Of the complete answers that had a budget; None without any."""
    known = [request.quality for request in requests if request.budgeted and request.quality is not None]
    return sum(known) / len(known) if known else None


def quantiles(values: Iterable[float | None], scale: float = 1.0) -> dict[str, float | None]:
    """p50, p95 and p99 of those that there are, times `scale`."""
    known = [value for value in values if value is not None]
    if not known:
        return {"p50": None, "p95": None, "p99": None}
    found = np.quantile(known, (0.5, 0.95, 0.99)) * scale
    return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))


def summary(requests: Sequence[Answered], seconds: float) -> dict[str, object]:
    """All figures of one run over a replay of `seconds`. Times in milliseconds."""
    kinds = {kind: [request for request in requests if request.kind == kind] for kind in ("interactive", "relaxed")}
    errors = [request.predicted_error for request in requests if request.predicted_error is not None]
    lag = quantiles((request.lag for request in requests), 1e3)
    return {
        "requests": len(requests),
        "budgeted": sum(request.budgeted for request in requests),
        "complete": sum(request.complete for request in requests),
        "refused": sum(request.refused for request in requests),
        "attainment": attainment(requests),
        "attainment_by_client": attainment(requests, by_client=True),
        "attainment_interactive": attainment(kinds["interactive"]),
        "attainment_relaxed": attainment(kinds["relaxed"]),
        "attainment_worst_30s": worst_window(requests, seconds),
        "goodput_per_second": goodput(requests, seconds),
        "goodput_per_second_by_client": goodput(requests, seconds, by_client=True),
        "mean_quality": mean_quality(requests),
        "mean_quality_met": mean_quality(request for request in requests if request.met),
        "ttft_ms": quantiles((request.ttft for request in requests), 1e3),
        "tpot_ms": quantiles((request.tpot for request in requests), 1e3),
        "total_ms": quantiles((request.total for request in requests), 1e3),
        "no_budget_total_ms": quantiles((r.total for r in requests if not r.budgeted), 1e3),
        "prediction_error": {
            "median": float(np.median(errors)) if errors else None,
            "absolute": quantiles(map(abs, errors)),
        },
        "switches": sum(request.switches for request in requests),
        "refilled_tokens": sum(request.refilled for request in requests),
        "client_lag_ms": lag,
        "void": is_void(request.lag for request in requests),
    }


def is_void(lags: Iterable[float]) -> bool:
    """Whether the client was too late for the run to count."""
    known = list(lags)
    return bool(known) and float(np.quantile(known, 0.99)) > MOST_LAG_SECONDS
