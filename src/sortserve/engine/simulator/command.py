"""`sortserve simulate`: replay a trace against simulated replicas, policies side by side, and answer capacity questions."""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sortserve.engine.errors import StartupError
from sortserve.engine.policies.protocol import Policy
from sortserve.engine.policies.registry import POLICY_NAMES, make_policy
from sortserve.engine.rungs import Rungs
from sortserve.engine.simulator import plots, report
from sortserve.engine.simulator.capacity import closed_loop_rate
from sortserve.engine.simulator.experiment import Result, Scenario, compare, find_replicas
from sortserve.engine.simulator.hardware import BACKENDS, measured_config, replica_config
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import BudgetMix, Trace, read_trace


def run(args: argparse.Namespace) -> int:
    """The command; raises StartupError for what cannot be done with these arguments."""
    try:
        trace = read_trace(args.trace).scaled_lengths(args.lengths)
        config = _replica(args)
        mix = BudgetMix(args.interactive, args.relaxed, 0.0 if args.best_effort else 1.0)
        makers = {name: maker(name, config.rungs) for name in args.policy.split(",")}
    except OSError as error:
        raise StartupError(f"{error.filename or args.trace}: {error.strerror}", param="trace") from error
    except ValueError as error:
        raise StartupError(str(error), param="simulate") from error
    config = replace(config, max_running=args.max_running, step_tokens=args.step_tokens, noise=args.noise)
    full = _print_capacity(trace, config, args)
    rates = {load: load * full * args.replicas for load in args.load}
    if args.rate is not None:
        rates = {args.rate / (full * args.replicas): args.rate}
    results = {}
    for load, rate in rates.items():
        scenario = Scenario(rate, args.seconds, args.replicas, args.even, mix, args.system_prompt)
        if args.find_replicas:
            _print_replicas(makers, trace, config, scenario, args)
            continue
        try:
            results[load] = compare(makers, trace, config, scenario, args.seeds, bound=not args.no_bound)
        except ValueError as error:
            raise StartupError(f"{args.trace}: {error}; take fewer --seconds", param="seconds") from error
        _print_result(load, results[load])
    if args.out is not None and results:
        _write(args, full, results)
    return 0


def _replica(args: argparse.Namespace) -> ReplicaConfig:
    """By name of model and device, or by a folder and what was measured with it. Raises ValueError and OSError."""
    if args.cost is None:
        return replace(replica_config(args.model, args.device), capabilities=BACKENDS[args.backend])
    return measured_config(Path(args.model), args.cost, args.kv_memory, backend=args.backend)


def maker(name: str, rungs: Rungs) -> Callable[[], Policy]:
    """Makes a policy by name, anew for each run; `fixed:P` is place P of the ladder, `fixed` the full model."""
    base, _, place = name.partition(":")
    if place and not (base == "fixed" and place.isdigit() and int(place) <= rungs.full):
        raise ValueError(f"no policy {name!r}; fixed:PLACE takes a place from 0 to {rungs.full}")
    options = {"place": int(place)} if place else {}
    make_policy(base, rungs, **options)  # a wrong name is told at once
    return lambda: make_policy(base, rungs, **options)


def _print_capacity(trace: Trace, config: ReplicaConfig, args: argparse.Namespace) -> float:
    """Closed-loop capacity of the full model and of the floor, requests a second and replica; returns the full model's."""
    rungs = config.rungs
    full, floor = (closed_loop_rate(config, trace, place) for place in (rungs.full, rungs.default_floor))
    print(f"{args.trace.name}: {len(trace)} requests, {trace.num_prompt.mean():.0f} tokens in, ", end="")
    print(f"{trace.num_output.mean():.0f} out; {args.model} on {args.device}, {args.replicas} replica(s)")
    print(f"capacity, closed loop: full model {full:.2f} requests/s a replica, floor {floor:.2f} ({floor / full:.2f}x)")
    if floor < 2.5 * full:
        print("note: the floor does less than 2.5 times the full model: little can be won on this ladder and trace")
    return full


def _print_result(load: float, result: Result) -> None:
    scenario = result.scenario
    arrivals = "even arrivals" if scenario.even else "the trace's bursts"
    print(
        f"\nload {load:.2f} of full-size capacity: {scenario.rate:.2f} requests/s for {scenario.seconds:g} s, {arrivals}"
    )
    print(report.bound_line(result))
    print(report.text_table(report.HEADER, report.rows(result)))
    print("switches by reason:\n" + report.reasons(result))


def _print_replicas(
    makers: Mapping[str, Callable[[], Policy]],
    trace: Trace,
    config: ReplicaConfig,
    scenario: Scenario,
    args: argparse.Namespace,
) -> None:
    print(f"\n{scenario.rate:.2f} requests/s with {100 * args.attainment:g} % of budgets kept need")
    for name, make in makers.items():
        found = find_replicas(make, trace, config, scenario, args.seeds, args.attainment, args.most_replicas)
        answer = f"more than {args.most_replicas}" if found is None else f"{found[0]} ({100 * found[1]:.2f} % kept)"
        print(f"  {name}: {answer}")


def _write(args: argparse.Namespace, full: float, results: Mapping[float, Result]) -> None:
    """JSON and plots."""
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "trace": args.trace.name,
        "model": args.model,
        "device": args.device,
        "full_capacity": full,
        "loads": {f"{load:.4g}": report.plain(result) for load, result in results.items()},
    }
    path = args.out / "simulate.json"
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    written = [path]
    if not args.no_plots:
        written += plots.draw(results, f"{args.trace.name}, {args.model} on {args.device}", args.out / "simulate")
    print("\nwritten: " + ", ".join(str(path) for path in written))


def _finite(value: object) -> object:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_arguments(add: Callable[..., object], positive: Callable[[str], int]) -> None:
    """The arguments of the command."""
    add("--trace", type=Path, required=True, metavar="FILE", help="Azure CSV or Mooncake JSONL")
    add(
        "--model",
        default="llama-3.1-8b",
        help="llama-3.1-8b or llama-3.1-70b, with --cost a folder; default: the first",
    )
    add("--device", default="h200", help="h100 or h200, several that split each layer as h200x4; default: h200")
    add(
        "--cost",
        type=Path,
        metavar="FILE",
        help="step times as a server has measured them (it names the file when it starts); --model is its folder then",
    )
    add("--kv-memory", type=float, default=2.0**31, metavar="BYTES", help="with --cost; default: 2 GiB")
    add("--backend", choices=tuple(BACKENDS), default="native", help="whose abilities a replica has; default: native")
    add("--replicas", type=positive, default=1, help="default: 1")
    add("--policy", default="slack,fixed", metavar="NAMES", help=f"of {', '.join(POLICY_NAMES)}, fixed:PLACE")
    add("--load", type=_numbers, default=(1.0,), metavar="X[,X]", help="of full-size closed-loop capacity; default: 1")
    add("--rate", type=_positive_number, help="requests a second, in place of --load")
    add("--seconds", type=_positive_number, default=120.0, help="of trace per seed; default: 120")
    add("--lengths", type=_positive_number, default=1.0, help="scale of the trace's lengths; default: 1")
    add("--seeds", type=_seeds, default=(0, 1, 2, 3, 4), metavar="N[,N]", help="default: 0,1,2,3,4")
    add("--even", action="store_true", help="arrivals at the same rate without the trace's bursts")
    add("--interactive", type=_share, default=0.5, help="share of requests with TTFT and TPOT budgets; default: 0.5")
    add("--relaxed", type=_share, default=0.4, help="share with a total budget; the rest has none; default: 0.4")
    add("--best-effort", action="store_true", help="no budget may be refused; default: all may")
    add(
        "--system-prompt",
        type=int,
        default=0,
        metavar="TOKENS",
        help="that half of the requests begin with; default: 0",
    )
    add("--max-running", type=positive, default=256, help="requests in a replica at a time; default: 256")
    add("--step-tokens", type=positive, default=2048, help="rows of a step; default: 2048")
    add("--noise", type=float, default=0.0, help="standard deviation of the logarithm of step times; default: 0")
    add("--no-bound", action="store_true", help="skip the bound, which needs scipy")
    add("--find-replicas", action="store_true", help="how many replicas keep --attainment of the budgets")
    add("--attainment", type=_share, default=0.99, help="for --find-replicas; default: 0.99")
    add("--most-replicas", type=positive, default=64, help="for --find-replicas; default: 64")
    add("--out", type=Path, metavar="FOLDER", help="write simulate.json and plots there")
    add("--no-plots", action="store_true", help="only the JSON; plots need matplotlib")


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_positive_number(part) for part in text.split(","))


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share in [0, 1]")
    return value


def _seeds(text: str) -> Sequence[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them")
    return tuple(int(part) for part in text.split(","))
