"""What was measured, as lines of progress, JSON and a Markdown table."""

import json
import os
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.common import Result, ceilings, small
from benchmarks.gpu.correctness import Check
from benchmarks.gpu.end_to_end import Row
from benchmarks.provenance import commit


@dataclass
class Report:
    """Fills while the sections run."""

    machine: dict[str, object]
    dry_run: bool
    began: float = field(default_factory=time.monotonic)
    checks: list[Check] = field(default_factory=list)
    kernels: list[Result] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    sanitizer: str = "not run"

    @classmethod
    def start(cls, device: torch.device, torch_version: str, triton_version: str, structs: str) -> "Report":
        """Name the machine and measure its ceilings."""
        tiny = small(device)
        ceiling = ceilings(device)
        machine: dict[str, object] = {
            "gpu": "none: CPU through Triton's interpreter" if tiny else torch.cuda.get_device_name(device),
            "memory_gib": 0 if tiny else round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
            "torch": torch_version,
            "triton": triton_version,
            "cuda": torch.version.cuda,
            "gigabytes_per_second": round(ceiling.bytes_per_second / 1e9, 1),
            "teraflops": round(ceiling.flops_per_second / 1e12, 1),
            "plans": structs,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
        }
        report = cls(machine, tiny)
        for name, value in machine.items():
            report.say(f"{name}: {value}")
        return report

    @property
    def correct(self) -> bool:
        """Whether nothing was found wrong."""
        return all(check.passed for check in self.checks) and not self.failures

    def say(self, line: str) -> None:
        """One line of progress, with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:6.1f}] {line}", flush=True)

    def failed(self, what: str, error: Exception) -> None:
        """Something ended with an error."""
        self.failures[what] = "".join(traceback.format_exception(error))[-3000:]
        self.say(f"  FAILED {what}: {self.failures[what]}")

    def took(self, section: str, seconds: float) -> None:
        """A section is over."""
        self.seconds[section] = seconds
        self.say(f"   {section} took {seconds:.1f} s")

    def kernel(self, result: Result) -> None:
        """One measured point of a kernel."""
        self.kernels.append(result)
        others = ", ".join(f"{name} {taken:.4f}" for name, taken in result.compared.items())
        self.say(
            f"  {result.name}, {result.shape}: {result.milliseconds:.4f} ms, ceiling {result.ceiling_ms:.4f} "
            f"({result.share:.0%}) {others}"
        )

    def write(self, folder: Path) -> None:
        """results/gpu-<GPU>.json and .md; a dry run's name says so."""
        if str(folder) == os.devnull:
            return
        folder.mkdir(parents=True, exist_ok=True)
        gpu = "dry-run" if self.dry_run else str(self.machine["gpu"]).lower().replace(" ", "-")
        content = {
            "benchmark": "gpu",
            "command": "python -m benchmarks.gpu",
            "machine": self.machine,
            "seconds": self.seconds,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "kernels": [asdict(result) | {"share_of_ceiling": result.share} for result in self.kernels],
            "steps": [asdict(row) for row in self.rows],
            "sanitizer": self.sanitizer,
            "failures": self.failures,
        }
        (folder / f"gpu-{gpu}.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / f"gpu-{gpu}.md").write_text("\n".join(self._markdown()) + "\n")

    def _markdown(self) -> list[str]:
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        lines = [f"# GPU benchmarks: {self.machine['gpu']}", "", f"`python -m benchmarks.gpu`. {about}.", ""]
        if self.dry_run:
            lines += ["A dry run on the CPU: the times mean nothing.", ""]
        passed = sum(check.passed for check in self.checks)
        lines += [f"Correctness: {passed} of {len(self.checks)} checks came out as they must.", ""]
        lines += [f"compute-sanitizer: {self.sanitizer}.", "", "## Steps", ""]
        lines += _table(
            ("what", "device ms", "wall ms", "ideal ms", "figures", "target", ""),
            [_step_cells(row) for row in self.rows],
        )
        lines += ["", "## Kernels", ""]
        lines += _table(
            ("kernel", "shape", "ms", "ceiling ms", "reached", "others, ms"),
            [_kernel_cells(result) for result in self.kernels],
        )
        lines += ["", "## Checks", ""]
        lines += _table(("what", "relative error", "allowed", ""), [_check_cells(check) for check in self.checks])
        return lines + [f"\nFAILED {what}:\n\n```\n{words}\n```" for what, words in self.failures.items()]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("-",) * len(head), *rows)]


def _step_cells(row: Row) -> tuple[str, ...]:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
    verdict = {None: "", True: "reached", False: "missed"}[row.reached]
    times = (f"{row.device_ms:.3f}", f"{row.wall_ms:.3f}", f"{row.ideal_ms:.3f}")
    return (f"{row.section}: {row.what}", *times, figures, row.target, verdict)


def _kernel_cells(result: Result) -> tuple[str, ...]:
    others = ", ".join(f"{name} {taken:.4f}" for name, taken in result.compared.items())
    times = (f"{result.milliseconds:.4f}", f"{result.ceiling_ms:.4f}", f"{result.share:.0%}")
    return (result.name, result.shape, *times, others)


def _check_cells(check: Check) -> tuple[str, ...]:
    allowed = f"{'over ' if check.must_fail else ''}{check.allowed:.2e}"
    return (check.what, f"{check.error:.2e}", allowed, "ok" if check.passed else "FAILED")
