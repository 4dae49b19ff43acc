"""`python -m benchmarks.simulator --traces FOLDER`: the comparison of all policies in the simulator.

An 8B model on an H200 with Sorted LLaMA's ladder, the Azure traces, loads from 0.5 to 3 times the full model's capacity,
bursts apart from even arrivals. Writes results/simulator.json, simulator.md and plots. About half an hour on one core.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks.simulator import judge, speed, sweep
from sortserve.engine.simulator import plots, report
from sortserve.engine.simulator.experiment import Result
from sortserve.engine.simulator.traces import BudgetMix

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    add = parser.add_argument
    add("--traces", type=Path, required=True, metavar="FOLDER", help="with " + " and ".join(sweep.TRACES.values()))
    add("--only", default=",".join(sweep.TRACES), metavar="NAME[,NAME]", help="of conv, code; default: both")
    add("--seconds", type=float, default=60.0, help="of trace per seed; default: 60")
    add("--seeds", type=int, default=5, help="number of seeds; default: 5")
    add("--loads", default=",".join(map(str, sweep.BURST_LOADS)), help="with the trace's bursts")
    add("--even-loads", default=",".join(map(str, sweep.EVEN_LOADS)), help="with even arrivals")
    add("--policies", default=",".join(sweep.POLICIES), help=f"default: {','.join(sweep.POLICIES)}")
    add("--jobs", type=int, default=1, help="processes; default: 1")
    add("--out", type=Path, default=RESULTS, help="folder for the results; default: benchmarks/results")
    add("--no-speed", action="store_true", help="skip the simulator's own speed")
    args = parser.parse_args()
    began = time.monotonic()
    traces = args.only.split(",")
    capacity = sweep.capacities(args.traces, traces)
    confidence: dict[str, Any] = {}
    tried: dict[str, Any] = {}
    for trace in traces:
        print(f"{trace}: closed-loop requests/s by rung: {', '.join(f'{rate:.1f}' for rate in capacity[trace])}")
        confidence[trace] = {}
        if "confidence" in args.policies.split(","):
            found = sweep.best_confidence(args.traces, trace, capacity[trace][-1], args.seconds / 2)
            confidence[trace], tried[trace] = found
            print(f"{trace}: best confidence: {confidence[trace]}", flush=True)
    setup = sweep.Setup(
        args.traces,
        {trace: rates[-1] for trace, rates in capacity.items()},
        confidence,
        args.seconds,
        range(args.seeds),
        args.policies.split(","),
    )
    burst, even = (tuple(map(float, text.split(","))) if text else () for text in (args.loads, args.even_loads))
    wanted = list(sweep.points(traces, burst, even))
    starving = [sweep.Point(trace, False, 3.0, BudgetMix()) for trace in traces]  # a tenth has no budget
    results: dict[sweep.Point, Result] = {}

    def done(point: sweep.Point, result: Result) -> None:
        results[point] = result
        print(
            f"\n== {point.trace}, {'even' if point.even else 'bursts'}, load {point.load:g} [{point.mix is sweep.MIX}]"
        )
        print(report.bound_line(result))
        print(report.text_table(report.HEADER, report.rows(result)), flush=True)

        _write(args, traces, capacity, tried, results, [])  # half an hour is long: what is there is kept

    sweep.run_all(setup, [*wanted, *starving], args.jobs, done)
    if not args.no_speed:
        speeds = [
            speed.speed(args.traces, policy, running, 3 * running + 300)
            for policy in ("fixed", "slack")
            for running in (256, 1000)
        ]
        _write(args, traces, capacity, tried, results, speeds)
    _draw(args, traces, results)
    print(f"\n{time.monotonic() - began:.0f} s")


def _write(
    args: argparse.Namespace,
    traces: list[str],
    capacity: dict[str, list[float]],
    tried: dict[str, Any],
    results: dict[sweep.Point, Result],
    speeds: list[dict[str, float | str]],
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    content = _content(args, capacity, tried, results, speeds)
    (args.out / "simulator.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (args.out / "simulator.md").write_text(_markdown(args, traces, capacity, results, speeds), encoding="utf-8")


def _draw(args: argparse.Namespace, traces: list[str], results: dict[sweep.Point, Result]) -> None:
    for trace in traces:
        for is_even in (False, True):
            here = {at.load: result for at, result in _main(results).items() if (at.trace, at.even) == (trace, is_even)}
            if here:
                name = f"simulator_{trace}_{'even' if is_even else 'bursts'}"
                plots.draw(here, f"{trace}, {'even arrivals' if is_even else 'bursts'}", args.out / name)


def _main(results: dict[sweep.Point, Result]) -> dict[sweep.Point, Result]:
    return {point: result for point, result in results.items() if point.mix == sweep.MIX}


def _content(
    args: argparse.Namespace,
    capacity: dict[str, list[float]],
    tried: dict[str, Any],
    results: dict[sweep.Point, Result],
    speeds: list[dict[str, float | str]],
) -> dict[str, Any]:
    return {
        "benchmark": "simulator",
        "command": f"python -m benchmarks.simulator --traces FOLDER --seconds {args.seconds:g} --seeds {args.seeds}",
        "machine": platform.processor() or platform.machine(),
        "model": sweep.MODEL,
        "device": sweep.DEVICE,
        "capacity_by_place": capacity,
        "confidence_tried": tried,
        "speed": speeds,
        "points": [
            {
                "trace": point.trace,
                "even": point.even,
                "load": point.load,
                "all_have_budgets": point.mix == sweep.MIX,
                **_finite(report.plain(result)),
            }
            for point, result in results.items()
        ],
    }


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; a request that was turned away never ended."""
    for run in content["runs"]:
        if run["unbudgeted_longest"] == float("inf"):
            run["unbudgeted_longest"] = None
    return content


def _markdown(
    args: argparse.Namespace,
    traces: list[str],
    capacity: dict[str, list[float]],
    results: dict[sweep.Point, Result],
    speeds: list[dict[str, float | str]],
) -> str:
    parts = [
        "# Policies in the simulator",
        f"{sweep.MODEL} on {sweep.DEVICE}, Sorted LLaMA's ladder, {args.seconds:g} s of trace, {args.seeds} seeds, means "
        "with 95 % intervals. `bursts` are the trace's own arrivals, stretched to the load; `even` the same requests at "
        "random times. All have budgets that may be refused (55 % TTFT and TPOT, 45 % total); refused is missed.",
        "Made by `python -m benchmarks.simulator --traces FOLDER`.",
    ]
    for trace in traces:
        rates = ", ".join(f"{rate:.1f}" for rate in capacity[trace])
        parts.append(f"## {trace}\n\nClosed-loop capacity by rung, requests a second: {rates}.")
        for is_even in (False, True):
            table = judge.tables(_main(results), trace, is_even)
            if table:
                parts.append(f"### {trace}, {'even arrivals' if is_even else 'bursts'}\n\n{table}")
    parts.append("## What was to be reached\n\n" + "\n".join(judge.verdicts(_main(results))))
    for point, result in results.items():
        if point.mix != sweep.MIX:
            lines = [
                [policy, f"{max(run.summary.unbudgeted_longest for run in result.of(policy)):.0f}"]
                for policy in report.policies_of(result)
            ]
            title = f"## {point.trace}, {point.load:g}x, a tenth without a budget: longest wait of one of them, seconds"
            parts.append(title + "\n\n" + report.markdown_table(["policy", "seconds"], lines))
    if speeds:
        rows = [[str(at["policy"]), str(at["running"]), f"{at['real_time']:.0f}x"] for at in speeds]
        parts.append("## Speed of the simulator\n\n" + report.markdown_table(["policy", "running", "real time"], rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
