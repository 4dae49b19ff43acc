"""Results as text, as JSON and as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sortserve.engine.simulator.experiment import Result, Run
from sortserve.engine.simulator.summary import interval

HEADER = (
    "policy",
    "attained %",
    "goodput/s",
    "of bound %",
    "quality",
    "refused %",
    "late %",
    "TTFT p50/p95/p99 s",
    "TPOT p50/p95/p99 ms",
    "total p50/p95/p99 s",
    "none: longest s",
    "switches/req",
    "refilled %",
    "KV peak %",
    "x real time",
)


def policies_of(result: Result) -> list[str]:
    """Names, in the order of the runs."""
    return list(dict.fromkeys(run.policy for run in result.runs))


def bound_share(result: Result, run: Run) -> float:
    """Goodput over the bound's; NaN if no bound was asked for."""
    bound = result.bounds.get(run.seed)
    return run.summary.goodput / bound.goodput if bound is not None and bound.goodput > 0 else float("nan")


def rows(result: Result) -> list[list[str]]:
    """A line of figures per policy: means over seeds, with half the 95 % interval where there are several."""
    lines = []
    for policy in policies_of(result):
        runs = result.of(policy)
        summaries = [run.summary for run in runs]
        switches = [sum(each.switches.values()) / max(each.requests + each.unbudgeted, 1) for each in summaries]
        lines.append(
            [
                policy,
                _with_interval([100 * each.attainment for each in summaries], 1),
                _with_interval([each.goodput for each in summaries], 2),
                _with_interval([100 * bound_share(result, run) for run in runs], 1),
                _with_interval([each.mean_quality for each in summaries], 3),
                f"{np.mean([100 * each.refused for each in summaries]):.1f}",
                f"{np.mean([100 * each.late for each in summaries]):.1f}",
                _triple([each.ttft for each in summaries], 1.0, 2),
                _triple([each.tpot for each in summaries], 1e3, 0),
                _triple([each.total for each in summaries], 1.0, 1),
                f"{max(each.unbudgeted_longest for each in summaries):.0f}",
                f"{np.mean(switches):.2f}",
                f"{np.mean([100 * each.refilled_share for each in summaries]):.2f}",
                f"{max(100 * each.kv_peak for each in summaries):.0f}",
                f"{np.median([run.speed for run in runs]):.0f}",
            ]
        )
    return lines


def bound_line(result: Result) -> str:
    """The bound in words."""
    if not result.bounds:
        return "no bound"
    goodput, width = interval(np.array([bound.goodput for bound in result.bounds.values()]))
    met, met_width = interval(np.array([100 * bound.met for bound in result.bounds.values()]))
    return f"at most possible: goodput {goodput:.2f} ±{width:.2f} a second, attained {met:.1f} ±{met_width:.1f} %"


def reasons(result: Result) -> str:
    """Switches by reason, summed over seeds, a line per policy."""
    lines = []
    for policy in policies_of(result):
        counts: dict[str, int] = {}
        for run in result.of(policy):
            for reason, number in run.summary.switches.items():
                counts[reason] = counts.get(reason, 0) + number
        lines.append(f"{policy}: " + (", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"))
    return "\n".join(lines)


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns of equal width."""
    table = [list(header), *[list(line) for line in lines]]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The same for Markdown."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def plain(result: Result) -> dict[str, Any]:
    """For JSON: everything but the requests themselves."""
    scenario = result.scenario
    return {
        "rate": scenario.rate,
        "seconds": scenario.seconds,
        "replicas": scenario.replicas,
        "even": scenario.even,
        "system_prompt": scenario.system_prompt,
        "bounds": {
            str(seed): {"goodput": bound.goodput, "attainment": bound.met} for seed, bound in result.bounds.items()
        },
        "runs": [
            {
                "policy": run.policy,
                "seed": run.seed,
                "speed": run.speed,
                "of_bound": None if np.isnan(share := bound_share(result, run)) else share,
                **run.summary.plain(),
            }
            for run in result.runs
        ],
    }


def _with_interval(values: Sequence[float], digits: int) -> str:
    if any(np.isnan(value) for value in values):
        return "-"
    mean, width = interval(np.array(values))
    return f"{mean:.{digits}f}" + (f" ±{width:.{digits}f}" if len(values) > 1 else "")


def _triple(values: Sequence[tuple[float, ...]], unit: float, digits: int) -> str:
    return " / ".join(f"{value * unit:.{digits}f}" for value in np.mean(np.array(values), axis=0))
