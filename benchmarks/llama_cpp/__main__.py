"""`python -m benchmarks.llama_cpp --gguf FILE --python PYTHON [--model FOLDER]`: greedy decode throughput with int8 weights
beside llama.cpp's Q8_0, at batch 1, 8 and 32, step by step in turn, a process each. The file is of the same model:

    python3.11 -m venv llama-env && llama-env/bin/pip install llama-cpp-python==0.3.36   # PYTHON: llama-env/bin/python
    python convert_hf_to_gguf.py MODEL --outtype q8_0 --outfile FILE   # of llama.cpp; with its gguf-py, torch, transformers

Our step is the engine's: plan, model, sampler and bookkeeping; llama.cpp's is `llama_decode` and the largest logit. Between
steps both wait until the other's threads have gone to sleep.
"""

import argparse
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch

from benchmarks.common import CONTEXT, DEFAULT_MODEL, Driver, alternate, median, paired_ratio, report
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config

ROUNDS = {1: 40, 8: 25, 32: 15}  # by batch
REST_SECONDS = 0.02


class Worker:
    """llama.cpp in its process."""

    def __init__(self, python: Path, gguf: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("worker.py")), str(gguf), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in: IO[str] = self._process.stdin
        self._out: IO[str] = self._process.stdout
        self.version = self._answer().split()[1]

    def ask(self, line: str) -> str:
        """One line for another."""
        self._in.write(line + "\n")
        self._in.flush()
        return self._answer()

    def _answer(self) -> str:
        line = self._out.readline().strip()
        if not line:
            raise SystemExit("the process of llama.cpp ended")
        return line

    def close(self) -> None:
        """End it."""
        self._in.close()
        self._process.wait()


def rested(step: Callable[[], float]) -> Callable[[], float]:
    """The same after a short rest."""

    def run() -> float:
        time.sleep(REST_SECONDS)
        return step()

    return run


def main() -> None:
    """Parse, run, print medians and paired ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_cpp", description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the model in Q8_0")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter with llama-cpp-python and numpy")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the same model as Hugging Face has it")
    asked = parser.parse_args()
    theirs = Worker(asked.python, asked.gguf)
    print(f"llama-cpp-python {theirs.version} says: {theirs.ask('text def fibonacci(n):')}")
    ladder = Ladder.of(load_model_config(asked.model).shape, [])
    ours = Driver.load(asked.model, ladder, kv_bytes=512 << 20, dtype="bfloat16", max_step_tokens=512, weights="int8")
    figures: dict[str, object] = {
        "context": CONTEXT,
        "llama_cpp_python": theirs.version,
        "kernels": ours.engine.info.kernels,
        "weight_bytes": {"int8": ours.engine.info.weight_bytes, "q8_0_file": asked.gguf.stat().st_size},
    }
    checks: dict[str, bool] = {}
    for batch, rounds in ROUNDS.items():
        for _ in range(batch):
            ours.submit(CONTEXT, rounds + 4)
        ours.catch_up()
        theirs.ask(f"start {batch} {CONTEXT}")
        runs = [rested(ours.step), rested(lambda: float(theirs.ask("step")))]
        mine, other = alternate(runs, rounds)
        ours.clear()
        ratio = paired_ratio(other, mine)
        low, high = np.quantile([o / m for o, m in zip(other, mine, strict=True)], (0.25, 0.75))
        rate, their_rate = batch / median(mine), batch / median(other)
        print(
            f"batch {batch:2d}: int8 {rate:6.1f} tokens/s, llama.cpp Q8_0 {their_rate:6.1f}, ratio {ratio:.2f} "
            f"(middle half of the pairs {low:.2f}-{high:.2f})"
        )
        figures[f"batch_{batch}"] = {"tokens_s": rate, "llama_cpp_tokens_s": their_rate, "ratio": ratio}
        checks[f"batch {batch}: ahead of llama.cpp's Q8_0"] = ratio > 1
    theirs.close()
    report("llama_cpp", figures, checks)


if __name__ == "__main__":
    main()
