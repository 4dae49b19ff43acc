"""`python -m benchmarks.slo --trace FILE` (`make slo ARGS=...`): a trace replayed over HTTP against the real server, under
several policies and loads. Writes results/slo-NAME.json and .md, and plots where matplotlib is installed.

Capacity comes first: each sub-model pinned, in a closed loop. A load is a multiple of the full model's; `0.8f` is 0.8 of
the floor's. Every point starts a server of its own, policies of one load come one after another, and a point whose
client was late (send lag p99 over 5 ms) is void. Lengths are scaled, arrivals are stretched or squeezed to the load,
budgets are drawn with a seed and are the same for every policy.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.slo import report
from benchmarks.slo.bench import again, prepare, run_point
from benchmarks.slo.results import finish, save
from sortserve.server.cli import BUNDLED

_TEXT = Path(__file__).parents[2] / "tests" / "compat" / "tasks" / "held_out_books.jsonl"


def main() -> None:
    """Parse, and run."""
    asked = _parser().parse_args()
    # step times are profiled once, now, by the first server: not taken from a day when the machine was busy
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        run(asked)


def run(asked: argparse.Namespace) -> None:
    """Measure what comes first, then every point, and report."""
    bench = prepare(asked)
    points: list[dict[str, Any]] = []
    for text in asked.loads.split(","):
        for policy in asked.policies.split(","):
            points.append(run_point(bench, policy, bench.load_of(text)))
            print(_line(points[-1]), flush=True)
            save(bench, points)
    finish(bench, points, again(bench))


def _line(point: dict[str, Any]) -> str:
    foretold = point["simulated"]
    simulated = "" if foretold is None else f" (simulated {report.share(foretold['attainment'])})"
    return (
        f"  {point['load']:.2f}x {point['policy']:15s} attained {report.share(point['attainment'])}{simulated} (worst 30 s "
        f"{report.share(point['attainment_worst_30s'])}), quality {report.number(point['mean_quality'], 4)}, goodput "
        f"{point['goodput_per_second']:.2f}/s, refused {point['refused']} of {point['requests']}, lag p99 "
        f"{report.number(point['client_lag_ms']['p99'], 1)} ms{'  VOID' if point['void'] else ''}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.slo", description=__doc__)
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="Azure LLM inference trace (CSV) or Mooncake's format (JSON lines)")
    add("--model", type=Path, default=BUNDLED, help="model folder; default: the bundled one")
    add("--ladder", type=Path, help="instead of the model's own")
    add("--name", help="of the results; default: model and trace")
    add("--policies", default="fixed,reject-only,slack", help="also fixed:floor; default: fixed,reject-only,slack")
    add("--loads", default="0.8,1.5,0.8f", help="multiples of the full model's capacity; 0.8f: of the floor's")
    add("--seconds", type=float, default=60.0, help="of each point; default: 60")
    add(
        "--drain-seconds",
        type=float,
        default=10.0,
        help="waited after the last request at least, until no budget can be kept; default: 10",
    )
    add("--start", type=int, default=0, help="first request of the trace; default: 0")
    add("--lengths", type=float, default=0.125, help="scale of the trace's lengths; default: 0.125")
    add("--seed", type=int, default=0, help="of budgets and prompts; default: 0")
    add("--strict", type=float, default=1.0, help="share of the budgets that may be refused; default: 1")
    add("--no-budget", type=float, default=0.1, help="share of the requests without one; default: 0.1")
    add("--tightness", type=float, default=1.0, help="factor on all budgets; default: 1")
    add("--rungs", choices=("all", "ends"), default="all", help="whose capacity is measured; default: all")
    add("--clients", type=int, default=32, help="of the closed loop; default: 32")
    add("--capacity-seconds", type=float, default=8.0, help="of each closed loop; default: 8")
    add("--nice", type=int, default=5, help="added to the client's niceness; default: 5")
    add("--text", type=Path, default=_TEXT, help="that prompts are cut from; default: a few pages of books")
    add("--kv-memory", default="256MiB", help="of the server; default: 256MiB")
    add("--dtype", default="auto", help="of the server; default: auto, as it is served")
    add(
        "--simulated",
        action="store_true",
        help="also simulate each point with the step times that its server has found",
    )
    add("--server-flags", default="", help="more flags of `sortserve serve`, in one string")
    return parser


if __name__ == "__main__":
    main()
