"""One simulated run in figures. All rates are per second of the trace, all times virtual seconds."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sortserve.engine.rungs import Bools, Floats
from sortserve.engine.simulator.records import FINISHED, QUEUE_FULL, REFUSED
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import Outcome

QUANTILES = (0.5, 0.95, 0.99)
# 97.5 % points of Student's t by degrees of freedom; beyond them the normal distribution's
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Summary:
    """Figures of a run. Shares are of the requests with a budget unless said otherwise."""

    requests: int  # with a budget
    attainment: float  # share that kept its budget; refused is missed
    attainment_by_kind: dict[str, float]
    goodput: float  # quality of kept budgets a second
    mean_quality: float  # of finished requests with a budget
    refused: float  # share
    late: float  # share that ran and missed
    ttft: tuple[float, ...]  # QUANTILES over all that finished, seconds
    tpot: tuple[float, ...]
    total: tuple[float, ...]
    unbudgeted: int  # requests without a budget
    unbudgeted_longest: float  # seconds from arrival to the last token of the slowest of them; inf: one was turned away
    switches: dict[str, int]  # by reason and direction
    refilled_share: float  # of all prompt and output tokens
    preempted: int
    kv_peak: float  # share of the memory for K/V
    rows_per_step: float
    steps: dict[str, int]  # by kind
    tokens_by_rung: list[int]
    busy_seconds: float  # until the last step ended
    digest: str  # of the schedule

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarize(outcome: Outcome, config: ReplicaConfig, seconds: float) -> Summary:
    """Figures of `outcome`; `seconds` is what rates are per."""
    records = outcome.records
    workload = records.workload
    budgeted, finished = workload.budgeted, records.outcome == FINISHED
    refused = (records.outcome == REFUSED) | (records.outcome == QUEUE_FULL)
    count = max(int(budgeted.sum()), 1)
    kinds = np.array(workload.kind)
    first = records.first_token - workload.arrival
    total = records.last_token - workload.arrival
    several = finished & (workload.num_output > 1)
    tpot = (total[several] - first[several]) / (workload.num_output[several] - 1)
    num_steps = max(sum(records.steps.values()), 1)
    tokens = int(workload.num_prompt[finished].sum() + workload.num_output[finished].sum())
    return Summary(
        requests=int(budgeted.sum()),
        attainment=float(records.met[budgeted].sum() / count),
        attainment_by_kind={
            kind: float(records.met[kinds == kind].mean())
            for kind in ("interactive", "relaxed")
            if (kinds == kind).any()
        },
        goodput=float(records.quality[records.met].sum() / seconds),
        mean_quality=_mean(records.quality[budgeted & finished]),
        refused=float((refused & budgeted).sum() / count),
        late=float((finished & budgeted & ~records.met).sum() / count),
        ttft=_quantiles(first[finished]),
        tpot=_quantiles(tpot),
        total=_quantiles(total[finished]),
        unbudgeted=int((~budgeted).sum()),
        unbudgeted_longest=_longest(total, ~budgeted, finished),
        switches=dict(sorted(records.switched.items())),
        refilled_share=float(records.refilled.sum() / max(tokens, 1)),
        preempted=int(records.preempted.sum()),
        kv_peak=float(records.peak_kv_bytes / config.kv.capacity),
        rows_per_step=float(records.row_steps / num_steps),
        steps={str(kind): number for kind, number in sorted(records.steps.items())},
        tokens_by_rung=records.made.sum(axis=0).tolist(),
        busy_seconds=outcome.seconds,
        digest=outcome.digest,
    )


def interval(values: Floats) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); 0 for a single value."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return _mean(values), 0.0
    freedom = len(values) - 1
    factor = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96
    return float(values.mean()), float(factor * values.std(ddof=1) / np.sqrt(len(values)))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def _quantiles(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if len(values) else (0.0,) * len(QUANTILES)


def _longest(total: Floats, unbudgeted: Bools, finished: Bools) -> float:
    if not unbudgeted.any():
        return 0.0
    return float(total[unbudgeted].max()) if finished[unbudgeted].all() else float("inf")
