"""`sortserve generate`, `ladder` and `bench`: the model without a server."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sortserve.engine.budget import Budget
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.sampling import SamplingParams
from sortserve.server.flags import model_settings

if TYPE_CHECKING:
    from sortserve.engine.llm import LLM


def generate(folder: Path, args: argparse.Namespace) -> int:
    """Print the answers on stdout, and what made them on stderr."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    budget = None if args.budget_ms is None else Budget(total_ms=args.budget_ms)
    completions = _load(folder, args).generate(prompts, sampling, budget=budget, submodel=args.submodel)
    for prompt, completion in zip(prompts, completions, strict=True):
        summary = completion.summary
        if len(prompts) > 1:
            print(f"=== {prompt}")
        print(completion.text)
        made = ", ".join(f"{name}: {count}" for name, count in summary.submodels.items())
        kept = "" if summary.met is None else ", budget met" if summary.met else ", budget missed"
        print(
            f"[{len(completion.token_ids)} tokens in {summary.total_seconds:.2f} s by {made or 'no sub-model'}; "
            f"{completion.finish_reason}{kept}]",
            file=sys.stderr,
        )
    return 0


def ladder(folder: Path, args: argparse.Namespace) -> int:
    """Print the ladder as a table; reads config.json and ladder.json only."""
    shape = load_model_config(folder).shape
    found = Ladder.of_folder(folder, shape, args.ladder)
    full = found.costs[found.full]
    rows = [("id", "depth", "width", "quality", "MB/token", "GFLOP/token", "share of full")]
    for entry, cost in zip(found.entries, found.costs, strict=True):
        share = cost.weight_bytes / full.weight_bytes
        megabytes, gigaflops = cost.weight_bytes / 1e6, cost.flops / 1e9
        rows.append(
            (
                entry.id,
                str(entry.submodel.depth),
                _width(entry, shape.ffn_width),
                _quality(entry),
                f"{megabytes:.1f}" if megabytes < 100 else f"{megabytes:.0f}",
                f"{gigaflops:.3g}",
                f"{share:.0%}",
            )
        )
    _print_table(rows)
    measured = found.measured
    print(f"quality: {measured.metric} on {measured.data}" if measured is not None else "quality: not measured")
    return 0


def bench(folder: Path, args: argparse.Namespace) -> int:
    """Measure every sub-model, pinned: latency of one prompt, throughput of a batch. The last line is JSON."""
    llm = _load(folder, args)
    found = llm.engine.info.ladder
    vocabulary = llm.tokenizer.vocab_size
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True)
    rows: list[tuple[str, ...]] = [
        ("id", "quality", "first token ms", "ms/token", "tokens/s alone", f"tokens/s at {args.batch}")
    ]
    results = []
    for entry in found.entries:
        alone, batch, first = [], [], []
        for repeat in range(args.repeats + 1):
            # prompts of different tokens, so that the prefix cache finds none of them
            prompts = [
                [(7 + 31 * repeat + 101 * row + place) % vocabulary for place in range(args.prompt_tokens)]
                for row in range(args.batch)
            ]
            started = time.monotonic()
            completion = llm.generate(prompts[:1], sampling, submodel=entry.id)[0]
            between = time.monotonic()
            llm.generate(prompts, sampling, submodel=entry.id)
            ended = time.monotonic()
            if repeat:  # the first one warms up
                alone.append(between - started)
                batch.append(ended - between)
                first.append(completion.summary.first_token_seconds or 0.0)
        decode = (statistics.median(alone) - statistics.median(first)) / max(1, args.max_tokens - 1)
        result = {
            "submodel": entry.id,
            "first_token_ms": round(statistics.median(first) * 1e3, 2),
            "token_ms": round(decode * 1e3, 2),
            "tokens_per_second": round(args.max_tokens / statistics.median(alone), 2),
            "batch_tokens_per_second": round(args.max_tokens * args.batch / statistics.median(batch), 2),
        }
        results.append(result)
        rows.append((entry.id, _quality(entry), *(f"{result[name]}" for name in list(result)[1:])))
    _print_table(rows)
    names = ("prompt_tokens", "max_tokens", "batch", "repeats")
    print(json.dumps({"model": str(folder), **{name: getattr(args, name) for name in names}, "results": results}))
    return 0


def _load(folder: Path, args: argparse.Namespace) -> "LLM":
    from sortserve.engine.llm import LLM  # torch

    return LLM(folder, **model_settings(args))


def _width(entry: Entry, full: int) -> str:
    """One number where all layers agree, else the mean, with what is skipped."""
    widths = entry.submodel.widths
    text = str(widths[0]) if len(set(widths)) == 1 else f"mean {sum(widths) / len(widths):.0f}"
    skipped = len(entry.submodel.skip_attention)
    return f"{text} of {full}" + (f", {skipped} attentions skipped" if skipped else "")


def _quality(entry: Entry) -> str:
    if entry.quality is None:
        return "-"
    return f"{entry.quality.value:.3f}" + (" (degraded)" if entry.degraded else "")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns aligned: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
