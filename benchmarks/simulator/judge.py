"""The tables of the sweep, and what was to be reached."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.simulator.sweep import Point
from sortserve.engine.simulator.experiment import Result, Run
from sortserve.engine.simulator.report import bound_share, markdown_table, policies_of
from sortserve.engine.simulator.summary import interval

OTHERS = ("fixed", "reject-only", "slackfit")
"""What ratios are printed against."""


def tables(results: Mapping[Point, Result], trace: str, even: bool) -> str:
    """Attainment, goodput, its share of the bound and quality of every policy against load, with 95 % intervals."""
    here = {point.load: result for point, result in results.items() if (point.trace, point.even) == (trace, even)}
    loads = sorted(here)
    if not loads:
        return ""
    figures: dict[str, Callable[[Result, Run], float]] = {
        "budgets kept, %": lambda result, run: 100 * run.summary.attainment,
        "goodput, quality a second": lambda result, run: run.summary.goodput,
        "goodput, % of the bound": lambda result, run: 100 * bound_share(result, run),
        "mean quality of answers": lambda result, run: run.summary.mean_quality,
    }
    parts = []
    for title, figure in figures.items():
        digits = 3 if "mean" in title else 1
        lines = [
            [policy, *(_cell([figure(here[at], run) for run in here[at].of(policy)], digits) for at in loads)]
            for policy in policies_of(here[loads[0]])
        ]
        if "kept" in title or "second" in title:
            lines.append(["**bound**", *(_bound_cell(here[at], "kept" in title) for at in loads)])
        parts.append(f"{title}:\n\n" + markdown_table(["load", *(f"{load:g}x" for load in loads)], lines))
    parts.append(
        "`slack` over others (attained, goodput; misses of the other over its own):\n\n" + _ratios(here, loads)
    )
    return "\n\n".join(parts)


def _ratios(here: Mapping[float, Result], loads: Sequence[float]) -> str:
    lines = []
    for other in OTHERS:
        cells = []
        for load in loads:
            ours, theirs = here[load].of("slack"), here[load].of(other)
            if not ours or not theirs:
                return ""
            met = _mean(ours, "attainment"), _mean(theirs, "attainment")
            goodput = _mean(ours, "goodput") / max(_mean(theirs, "goodput"), 1e-9)
            misses = (1 - met[1]) / max(1 - met[0], 1e-9)
            cells.append(f"{met[0] / max(met[1], 1e-9):.2f}x, {goodput:.2f}x; {min(misses, 999):.1f}x")
        lines.append([other, *cells])
    return markdown_table(["over", *(f"{load:g}x" for load in loads)], lines)


def verdicts(results: Mapping[Point, Result]) -> list[str]:
    """What was to be reached at each point, and whether it was."""
    lines = []
    for point in sorted(results, key=lambda at: (at.trace, at.even, at.load)):
        result = results[point]
        ours = result.of("slack")
        if not ours or not result.bounds:
            continue
        share = float(np.mean([bound_share(result, run) for run in ours]))
        met, possible = _mean(ours, "attainment"), float(np.mean([bound.met for bound in result.bounds.values()]))
        wanted = min(0.97, 0.95 * possible)
        # at equal attainment: nobody who keeps at least as many budgets may have more goodput
        better = [
            policy
            for policy in policies_of(result)
            if policy != "slack"
            and _mean(result.of(policy), "attainment") >= met
            and _mean(result.of(policy), "goodput") > _mean(ours, "goodput")
        ]
        arrivals = "even" if point.even else "bursts"
        lines.append(
            f"- {point.trace}, {arrivals}, {point.load:g}x: goodput {100 * share:.1f} % of the bound "
            f"({_word(share >= 0.9)} 90), attained {100 * met:.1f} % ({_word(met >= wanted)} {100 * wanted:.1f}); "
            + (f"**below {', '.join(better)}**" if better else "above every other policy")
        )
    return lines


def _word(reached: bool) -> str:
    return "reached:" if reached else "**missed:**"


def _mean(runs: Sequence[Run], name: str) -> float:
    return float(np.mean([getattr(run.summary, name) for run in runs]))


def _cell(values: Sequence[float], digits: int) -> str:
    if not values or any(np.isnan(value) for value in values):
        return "-"
    mean, width = interval(np.array(values))
    return f"{mean:.{digits}f} ±{width:.{digits}f}"


def _bound_cell(result: Result, met: bool) -> str:
    bounds = list(result.bounds.values())
    return _cell([100 * bound.met if met else bound.goodput for bound in bounds], 1)
