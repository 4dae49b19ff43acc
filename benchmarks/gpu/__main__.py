"""`python -m benchmarks.gpu`: all that needs a CUDA GPU, in under nine minutes: correctness in bfloat16, kernels against
their ceilings, whole steps on dummy weights of Llama-3.2-1B and Llama-3.1-8B shapes.

Needs torch, triton, transformers, safetensors and numpy beside this repository. Writes results/gpu-<GPU>.json and .md.
`--dry-run` runs every section on the CPU through Triton's interpreter, on tiny shapes: its times mean nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.report import Report

SECONDS = {"correctness": 75, "kernels": 160, "1b": 70, "8b": 150, "sanitizer": 60}
"""Limits by section: 515 in all. A section looks at its limit before each further point."""
KERNELS = ("ffn", "linear", "small", "attention", "rope_write")
"""Modules here with `run(device)`."""


def main() -> int:
    """Parse, look at the machine, run the sections; 0 only if all that was compared for correctness agrees."""
    asked = _parse()
    if asked.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from benchmarks.gpu.structs import have_structs

    structs = have_structs()
    try:
        import torch
        import triton
    except ImportError as error:
        print(f"torch and triton must be installed: {error}", file=sys.stderr)
        return 2
    if not asked.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU is usable here; `--dry-run` runs the same sections on the CPU, tiny", file=sys.stderr)
        return 2
    device = torch.device("cpu" if asked.dry_run else "cuda:0")
    from benchmarks.gpu.report import Report

    report = Report.start(device, torch.__version__, triton.__version__, structs)
    sections: dict[str, Callable[[], None]] = {
        "correctness": lambda: _correctness(device, report, asked.eager_only),
        "kernels": lambda: _kernels(device, report),
        "1b": lambda: _end_to_end("1b", device, report),
        "8b": lambda: _end_to_end("8b", device, report),
        "sanitizer": lambda: _sanitizer(report, asked.dry_run),
    }
    for name, section in sections.items():
        if (asked.only and name not in asked.only) or (asked.dry_run and name == "8b"):  # tiny, it would be 1b again
            continue
        _run(name, section, report)
        report.write(asked.out)  # after each section: what is there is kept if the machine goes
    return 0 if report.correct else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, through Triton's interpreter, tiny shapes")
    parser.add_argument("--only", nargs="+", choices=tuple(SECONDS), help="these sections alone")
    parser.add_argument("--eager-only", action="store_true", help="correctness without graphs, for compute-sanitizer")
    results = Path(__file__).resolve().parent.parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder for the JSON and the table")
    return parser.parse_args()


def _run(name: str, section: Callable[[], None], report: "Report") -> None:
    """One section, timed; an error ends it and is told, not the others."""
    import torch

    began = time.monotonic()
    report.say(f"== {name} (at most {SECONDS[name]} s)")
    try:
        section()
    except Exception as error:  # a benchmark must bring home what it has
        report.failed(name, error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    report.took(name, time.monotonic() - began)


def _correctness(device: Any, report: "Report", eager_only: bool) -> None:
    from benchmarks.gpu import correctness
    from benchmarks.gpu.common import Clock

    clock = Clock(SECONDS["correctness"] if device.type == "cuda" else 3600)
    correctness.run(device, clock, report.say, report.checks, eager_only=eager_only)


def _kernels(device: Any, report: "Report") -> None:
    """Each kernel's module in turn; an equal share of the time left for each, which its loops cannot be told: a module that
    is late is finished, and those behind it are left out once the time is over."""
    import importlib
    import importlib.util

    from benchmarks.gpu.common import Clock

    clock = Clock(SECONDS["kernels"])
    for name in KERNELS:
        if importlib.util.find_spec(f"benchmarks.gpu.{name}") is None:
            report.say(f"  {name}: has no benchmark")
            continue
        if clock.spent():
            report.say(f"  {name}: no time left")
            continue
        try:
            results = importlib.import_module(f"benchmarks.gpu.{name}").run(device)
        except Exception as error:  # the other kernels are still to be measured
            report.failed(f"kernel {name}", error)
            continue
        for result in results:
            report.kernel(result)


def _end_to_end(name: str, device: Any, report: "Report") -> None:
    from benchmarks.gpu import end_to_end
    from benchmarks.gpu.common import Clock

    # the interpreter is slow, and its test wants to see every section
    clock = Clock(SECONDS[name] if device.type == "cuda" else 3600)
    end_to_end.run(name, device, clock, report.say, report.rows)


def _sanitizer(report: "Report", dry_run: bool) -> None:
    """NVIDIA's memory checker over the kernels, on small shapes, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or dry_run:
        report.say("  compute-sanitizer is not on the PATH" if tool is None else "  left out of a dry run")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu"]
    command += ["--only", "correctness", "--eager-only", "--out", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS["sanitizer"])
        report.sanitizer = "no error" if done.returncode != 9 else done.stdout[-4000:]
    except subprocess.TimeoutExpired:
        report.sanitizer = f"stopped after {SECONDS['sanitizer']} s, no error until then"
    report.say(f"  compute-sanitizer: {report.sanitizer}")


if __name__ == "__main__":
    sys.exit(main())
