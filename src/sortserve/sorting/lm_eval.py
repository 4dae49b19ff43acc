"""Any task of lm-evaluation-harness, sub-model by sub-model, against a server of our own.

The harness stays in an environment of its own (`pip install lm-eval[api]`), named by its Python: it brings hundreds of
packages. It asks the server by `/v1/completions`, with log-probabilities for multiple choice.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder_file import Score
from sortserve.engine.model_config import load_model_config
from sortserve.sorting.answers import wilson

Progress = Callable[[str], None]
_READY_SECONDS = 600.0
_MAX_MODEL_LEN = 2048
_METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "f1")  # the first that a task has is its score


@dataclass(frozen=True)
class LmEval:
    """What is run: task names, questions of each (None: all), folder with tasks of one's own."""

    python: Path
    tasks: tuple[str, ...]
    limit: int | None = None
    include_path: Path | None = None
    dtype: str = "auto"

    def scores(
        self, folder: Path, ladder: Path, ids: Sequence[str], progress: Progress | None = None
    ) -> dict[str, dict[str, Score]]:
        """Scores by sub-model and task. Raises SortingError if the server or the harness fails."""
        found = {}
        longest = min(_MAX_MODEL_LEN, load_model_config(folder).max_context)
        with _serving(folder, ladder, self.dtype, longest) as url:
            for name in ids:
                found[name] = self._run(url, folder, name, longest)
                if progress is not None:
                    told = ", ".join(f"{task} {score.value:.3f}" for task, score in found[name].items())
                    progress(f"lm-eval {name}: {told}")
        return found

    def _run(self, url: str, folder: Path, name: str, longest: int) -> dict[str, Score]:
        arguments = {
            "model": f"sorted:{name}",
            "base_url": f"{url}/v1/completions",
            "num_concurrent": "4",
            "max_length": str(longest),
            "tokenizer_backend": "huggingface",
            "tokenizer": str(folder.absolute()),
        }
        with tempfile.TemporaryDirectory() as out:
            command = [str(self.python), "-m", "lm_eval", "run", "--model", "local-completions"]
            command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
            command += ["--tasks", ",".join(self.tasks), "--output_path", out, "--log_samples"]
            command += [] if self.limit is None else ["--limit", str(self.limit)]
            command += [] if self.include_path is None else ["--include_path", str(self.include_path.absolute())]
            # where tasks of one's own lie, because their data files are named relative to that
            where = self.include_path if self.include_path is not None else Path(out)
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            ended = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
            if ended.returncode != 0:
                raise SortingError(f"lm-eval exited {ended.returncode} on {name}: {ended.stderr.strip()[-1500:]}")
            files = sorted(Path(out).rglob("results_*.json"))
            if not files:
                raise SortingError(f"lm-eval wrote no results for {name}: {ended.stdout.strip()[-500:]}")
            return read_results(json.loads(files[-1].read_text(encoding="utf-8")))


def read_results(report: Mapping[str, Any]) -> dict[str, Score]:
    """Task -> score of a harness report: the first known metric, with an interval by the number of questions.

    Raises SortingError for a task that has none in [0, 1], such as a perplexity.
    """
    found = {}
    for task, values in report["results"].items():
        by_name = {key.split(",")[0]: float(value) for key, value in values.items() if isinstance(value, int | float)}
        metric = next((name for name in _METRICS if name in by_name), None)
        if metric is None or not 0 <= by_name[metric] <= 1:
            raise SortingError(f"task {task} reports {', '.join(by_name)}: none of {', '.join(_METRICS)}")
        count = int(report.get("n-samples", {}).get(task, {}).get("effective", by_name.get("sample_len", 0)))
        # the harness's standard error is 0 where all or no answers are right, however few there were
        found[task] = wilson(by_name[metric] * count, count)
    return found


@contextmanager
def _serving(folder: Path, ladder: Path, dtype: str, longest: int) -> Iterator[str]:
    """The address of a server of this folder and ladder, ready; ended with the block."""
    command = [sys.executable, "-m", "sortserve", "serve", str(folder), "--ladder", str(ladder), "--port", "0"]
    command += ["--served-model-name", "sorted", "--dtype", dtype, "--max-model-len", str(longest)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []

    def drain(stream: Any) -> None:
        lines.extend(stream)  # a pipe that nobody reads would stop the server

    reader = threading.Thread(target=drain, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        yield _wait_ready(process, lines)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)
        process.stderr.close()


def _wait_ready(process: "subprocess.Popen[str]", lines: Sequence[str]) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy is a way to 127.0.0.1
    ends = time.monotonic() + _READY_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        found = re.search(r"listening on (http://[\d.]+:\d+)", "".join(list(lines)))
        if found:
            try:
                with opener.open(f"{found[1]}/ready", timeout=10):
                    return found[1]
            except OSError:
                pass  # 503 while the model loads
        time.sleep(0.2)
    raise SortingError(f"the server did not get ready: {''.join(list(lines))[-1500:]}")
