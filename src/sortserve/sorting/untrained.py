"""`sortserve sort MODEL --no-training`: its arguments, and the call. Light: what computes is imported when it runs."""

import argparse
from pathlib import Path

from sortserve.engine.errors import SortingError
from sortserve.sorting.ladder_cli import Told, add_text_arguments, tell

METHODS = ("widths", "evopress", "uls", "llm-drop", "lim", "zd")
DEFAULT_MINUTES = 12.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this grade; MODEL, --to, --minutes and --seed are common to both grades."""
    group = parser.add_argument_group("without training")
    add = group.add_argument
    add(
        "--calibration",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="text that importance and searches look at; may repeat; default: what comes with the package",
    )
    add("--calibration-tokens", type=int, default=768, metavar="N", help="per source; default: 768")
    add("--budgets", default="85,70,55", metavar="PERCENT,...", help="of FFN neurons, searched; default: 85,70,55")
    add(
        "--levels",
        default="",
        metavar="PERCENT,...",
        help="widths a layer may have besides 100; default: any multiple of 128, with over three budgets 25,50,75",
    )
    add("--drop", default="12.5", metavar="PERCENT,...", help="of sub-layers, for methods that drop; default: 12.5")
    add("--methods", default="widths,evopress", help=f"of {', '.join(METHODS)}; default: widths,evopress")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the checkpoint's")
    add_text_arguments(parser, 512)


def run(model: Path, out: Path, args: argparse.Namespace) -> int:
    """Sort, search, measure and write the folder. Raises StartupError; then nothing was written."""
    from sortserve.sorting.untrained_run import Plan, sort_untrained

    methods = tuple(args.methods.split(","))
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise SortingError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    plan = Plan(
        model=model,
        out=out,
        calibration=tuple(args.calibration),
        calibration_tokens=args.calibration_tokens,
        held_out=tuple(args.held_out),
        held_out_tokens=args.tokens,
        window=args.window,
        budgets=_shares(args.budgets, "--budgets"),
        levels=_shares(args.levels, "--levels"),
        drop=_shares(args.drop, "--drop"),
        methods=methods,
        pairs=args.pairs,
        seconds=60 * (DEFAULT_MINUTES if args.minutes is None else args.minutes),
        seed=args.seed or 0,
        dtype=args.dtype,
    )
    tell(sort_untrained(plan, Told()))
    print(f"written to {out}; serve it: sortserve serve {out}")
    return 0


def _shares(text: str, name: str) -> tuple[float, ...]:
    """`85,70` as (0.85, 0.7)."""
    try:
        shares = tuple(float(part) / 100 for part in text.split(",") if part)
    except ValueError as error:
        raise SortingError(f"{name} is {text!r}, must be percentages such as 85,70") from error
    if not all(0 <= share < 1 for share in shares):
        raise SortingError(f"{name} is {text!r}, each must be in [0, 100)")
    return shares
