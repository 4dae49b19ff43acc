"""The report of the trace benchmark: a table as Markdown, all numbers as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = Mapping[str, Any]

_COLUMNS = """\
Attainment: share of the requests with a budget that kept it, refused ones did not; by the server's clock
(`sortserve.met`), and in brackets by the client's, from the moment a request was due. *Worst 30 s*: the lowest of any
30 s. Goodput: quality of the answers in time, summed, per second. Quality: mean of the complete answers that had a
budget. Error: median of |predicted - taken| / taken, and in brackets of the same with its sign. Times in ms, of
complete answers."""


def markdown(settings: Mapping[str, Any], points: Sequence[Point], plots: Sequence[Path]) -> str:
    """The page."""
    machine, capacity = settings["machine"], settings["capacity"]
    full = capacity[-1]["requests_per_second"]
    after = [f"{rung['submodel']} {rung['requests_per_second']:.2f}" for rung in settings["capacity_after"]]
    lines = [
        f"# Budgets under load: {settings['model']}, trace {settings['trace']}",
        "",
        f"{machine['cpu']}, {settings['date']}, commit {settings['commit']}. Made by",
        "",
        f"    {settings['command']}",
        "",
        settings["told"],
        "",
        "| sub-model | quality | requests/s | of the full model's | output tokens/s |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {rung['submodel']} | {rung['quality']:.4f}{'' if rung['measured'] else ' (share of weight bytes)'} | "
            f"{rung['requests_per_second']:.2f} | {rung['requests_per_second'] / full:.2f} | "
            f"{rung['output_tokens_per_second']:.0f} |"
            for rung in capacity
        ),
        "",
        *(["Once more at the end: " + ", ".join(after) + ".", ""] if after else []),
        _COLUMNS,
        "",
        *_points(points),
        "",
        *_simulated(points),
        "## Latencies",
        "",
        *_latencies(points),
        "",
        "## Why sub-models were chosen, and what moved",
        "",
        *_counters(points),
    ]
    for plot in plots:
        lines += ["", f"![{plot.stem}]({plot.name})"]
    return "\n".join(lines) + "\n"


def _points(points: Sequence[Point]) -> list[str]:
    head = (
        "load",
        "requests/s",
        "policy",
        "attainment",
        "worst 30 s",
        "interactive",
        "relaxed",
        "goodput/s",
        "quality",
    )
    rows = [
        (
            f"{point['load']:.2f}",
            f"{point['requests_per_second']:.1f}",
            point["policy"] + (" **(void)**" if point["void"] else ""),
            f"{share(point['attainment'])} ({share(point['attainment_by_client'])})",
            share(point["attainment_worst_30s"]),
            share(point["attainment_interactive"]),
            share(point["attainment_relaxed"]),
            f"{point['goodput_per_second']:.2f} ({point['goodput_per_second_by_client']:.2f})",
            number(point["mean_quality"], 4),
            str(point["refused"]),
            f"{number(point['prediction_error']['absolute']['p50'], 2)} "
            f"({number(point['prediction_error']['median'], 2)})",
            number(point["client_lag_ms"]["p99"], 1),
        )
        for point in points
    ]
    return table((*head, "refused", "error", "send lag p99"), rows)


def _simulated(points: Sequence[Point]) -> list[str]:
    """Of those that were; nothing if none was."""
    rows = [
        (
            f"{point['load']:.2f}",
            point["policy"],
            f"{share(point['attainment'])}, {share(told['attainment'])} ({_range(told)})",
            f"{point['goodput_per_second']:.2f}, {told['goodput_per_second']:.2f}",
            f"{number(point['mean_quality'], 4)}, {number(told['mean_quality'], 4)}",
        )
        for point in points
        if (told := point.get("simulated")) is not None
    ]
    if not rows:
        return []
    said = "The same requests in the simulator, with the server's step times, slowed down to its closed loops, five times\n"
    said += "with steps that vary by 5 %; in brackets from the worst to the best of these:"
    head = ("load", "policy", "attainment measured, simulated", "goodput/s", "quality")
    return ["## Simulated", "", said, "", *table(head, rows), ""]


def _range(told: Point) -> str:
    return " to ".join(share(end) for end in told["attainment_range"])


def _latencies(points: Sequence[Point]) -> list[str]:
    rows = [
        (
            f"{point['load']:.2f}",
            point["policy"],
            *(_three(point[name]) for name in ("ttft_ms", "tpot_ms", "total_ms", "no_budget_total_ms")),
            f"{point['complete']} of {point['requests']}",
        )
        for point in points
    ]
    head = ("load", "policy", "TTFT p50 / p95 / p99", "TPOT", "total", "total without a budget", "complete")
    return table(head, rows)


def _counters(points: Sequence[Point]) -> list[str]:
    rows = []
    for point in points:
        counters = point["counters"]

        def of(name: str, counters: Mapping[str, int] = counters) -> str:
            parts = [
                f"{key.partition('=')[2].rstrip('}')} {count}"
                for key, count in sorted(counters.items(), key=lambda item: -item[1])
                if key.startswith(name) and count
            ]
            return ", ".join(parts) or "-"

        rows.append(
            (
                f"{point['load']:.2f}",
                point["policy"],
                of("submodel_selected"),
                of("submodel_switches"),
                str(counters.get("refilled_tokens", 0)),
                str(counters.get("preemptions", 0)),
                of("requests_dropped"),
                of("generation_tokens"),
            )
        )
    head = ("load", "policy", "choices by reason", "switches", "refilled", "preempted", "refused", "output tokens by")
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def share(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return "-" if value is None else f"{value:.{digits}f}"


def _three(found: Mapping[str, float | None]) -> str:
    return " / ".join(number(found[name], 0) for name in ("p50", "p95", "p99"))
