"""`python -m benchmarks.vllm [PART ...] [--model FOLDER] [--rounds N]`: what the backend costs and what it saves, on vLLM's
CPU build. Parts, each of some minutes, of which the model's loading is one:

`full`: a decode step and a step of prompts at full depth against stock vLLM, at 1 and 8 requests, both engines in one
process and in turns step by step. `blocks`: the same with every FFN in two width blocks. `depths`: milliseconds of a decode
step in the layers at full and at half depth; and of a batch over four depths, against the ideal: each segment's share of a
whole step with as many rows.

Wants a quiet machine. Writes results/vllm.json, where parts of earlier runs stay, and ends in one JSON line.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.common import DEFAULT_MODEL, RESULTS, alternate, machine, median, module_command, paired_ratio
from benchmarks.provenance import commit
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from sortserve.engine.vllm.launch import engine_arguments

ARGUMENTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 512 << 20,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}
PROMPT_TOKENS = 64
CHUNK_TOKENS = 256  # of a step that is a prompt and nothing else
FULL_TARGET, HALF_TARGET, MIXED_TARGET = 0.97, 1.8, 1.1
SEGMENTS = 4
Figures = dict[str, Any]


def ladder_of(model: Path, folder: Path, width_percents: Sequence[int]) -> Path:
    """Write a ladder of four depths at each of these widths; its file."""
    shape = load_model_config(model).shape
    depths = [round(shape.num_layers * part / SEGMENTS) for part in range(1, SEGMENTS + 1)]
    entries = [
        Entry(f"d{depth}-w{percent}", SubModel.make(depth, shape.ffn_width * percent // 100))
        for depth in depths
        for percent in width_percents
    ]
    path = folder / f"ladder-{'-'.join(map(str, width_percents))}.json"
    Ladder.of(shape, entries).dump(path)
    return path


class Subject:
    """An engine that is stepped by hand, and how long its model's forward took in the last step."""

    def __init__(self, **arguments: Any) -> None:
        from vllm import LLM

        self._engine: Any = LLM(**arguments).llm_engine
        self._ids = count()
        self._asked: list[str] = []
        self.layers_seconds = 0.0
        model = self._engine.model_executor.driver_worker.worker.model_runner.model
        forward = model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = forward(*args, **kwargs)
            self.layers_seconds = time.perf_counter() - began
            return out

        model.forward = timed

    def ask(self, submodels: Sequence[str | None], prompt_tokens: int = PROMPT_TOKENS) -> None:
        """Requests that go on for ever; ends those that were there."""
        from vllm import SamplingParams

        self._engine.abort_request(self._asked)
        assert not self._engine.has_unfinished_requests()
        self._asked = [str(next(self._ids)) for _ in submodels]
        for number, (request_id, submodel) in enumerate(zip(self._asked, submodels, strict=True)):
            prompt = {"prompt_token_ids": [(7 * number + i) % 1000 + 5 for i in range(prompt_tokens)]}
            extra = None if submodel is None else {"sortserve_submodel": submodel}
            params = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True, extra_args=extra)
            self._engine.add_request(request_id, prompt, params)

    def begin(self, submodels: Sequence[str | None]) -> None:
        """The same, with their prompts computed and a step run."""
        self.ask(submodels)
        for _ in range(2 + -(-len(submodels) * PROMPT_TOKENS // ARGUMENTS["max_num_batched_tokens"])):
            self._engine.step()

    def step(self) -> float:
        """Seconds of one whole step."""
        began = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - began

    def layers(self) -> float:
        """Seconds in the layers of one step."""
        self.step()
        return self.layers_seconds

    def prompt(self, submodel: str | None) -> float:
        """Seconds of a step that is one prompt."""
        self.ask([submodel], CHUNK_TOKENS)
        return self.step()


def against_stock(model: Path, ladder: Path, full: str, rounds: int) -> Figures:
    """Ours over stock, in tokens per second, by pairs of steps."""
    stock = Subject(model=str(model), enforce_eager=True, async_scheduling=False, **ARGUMENTS)
    ours = Subject(**engine_arguments(model, cpu=True, ladder_path=ladder, **ARGUMENTS))
    found: Figures = {}
    for requests in (1, 8):
        stock.begin([None] * requests)
        ours.begin([full] * requests)
        theirs, mine = alternate([stock.step, ours.step], rounds)
        found[f"decode_{requests}"] = _compared(theirs, mine, requests)
    runs: list[Callable[[], float]] = [lambda: stock.prompt(None), lambda: ours.prompt(full)]
    theirs, mine = alternate(runs, max(4, rounds // 4))
    found["prompt"] = _compared(theirs, mine, CHUNK_TOKENS)
    return found


def _compared(theirs: Sequence[float], mine: Sequence[float], tokens: int) -> Figures:
    return {
        "stock_tokens_s": tokens / median(theirs),
        "tokens_s": tokens / median(mine),
        "ratio": paired_ratio(theirs, mine),
    }


def depths(model: Path, ladder: Path, ids: Sequence[str], rounds: int) -> Figures:
    """Seconds in the layers, of one engine whose batches take turns; the first step of a batch is not counted."""
    ours = Subject(**engine_arguments(model, cpu=True, ladder_path=ladder, **ARGUMENTS))
    full, half = ids[-1], ids[SEGMENTS // 2 - 1]
    found: Figures = {}
    for requests in (1, 8):
        whole, less = _turns(ours, [[full] * requests, [half] * requests], rounds)
        found[f"full_ms_{requests}"], found[f"half_ms_{requests}"] = 1e3 * median(whole), 1e3 * median(less)
        found[f"half_is_faster_by_{requests}"] = paired_ratio(whole, less)
    each = 8 // SEGMENTS
    rows = [each * (SEGMENTS - number) for number in range(SEGMENTS)]  # of the four segments
    mixed, *wholes = _turns(ours, [[*ids] * each, *([full] * number for number in rows)], rounds)
    ideals = [sum(steps) / SEGMENTS for steps in zip(*wholes, strict=True)]
    found |= {"mixed_ms": 1e3 * median(mixed), "ideal_ms": 1e3 * median(ideals)}
    found["mixed_over_ideal"] = paired_ratio(mixed, ideals)
    return found


def _turns(subject: Subject, batches: Sequence[Sequence[str]], rounds: int) -> list[list[float]]:
    """Seconds in the layers: of each batch the median of six steps in a row, `rounds` / 6 times."""

    def run(batch: Sequence[str]) -> float:
        subject.begin(batch)
        return median(subject.layers() for _ in range(6))

    return alternate([lambda batch=batch: run(batch) for batch in batches], max(3, rounds // 6))  # type: ignore[misc]


def checks(figures: Figures) -> dict[str, bool]:
    """What must be reached, as far as it was measured."""
    reached = {}
    for part in ("full", "blocks"):
        for name, found in figures.get(part, {}).items():
            reached[f"{part}, {name}: at least {FULL_TARGET}x stock"] = found["ratio"] >= FULL_TARGET
    if "depths" in figures:
        found = figures["depths"]
        for requests in (1, 8):
            faster = found[f"half_is_faster_by_{requests}"] >= HALF_TARGET
            reached[f"half depth, {requests} rows: at least {HALF_TARGET}x in the layers"] = faster
        reached[f"four depths: at most {MIXED_TARGET}x the ideal"] = found["mixed_over_ideal"] <= MIXED_TARGET
    return reached


def main() -> None:
    """Parse, run, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="full, blocks, depths; default: all of them")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face model folder")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of steps in a comparison; default: 60")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    layers = load_model_config(asked.model).shape.num_layers
    ids = [f"d{round(layers * part / SEGMENTS)}-w100" for part in range(1, SEGMENTS + 1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers: dict[str, Callable[[], Figures]] = {
            "full": lambda: against_stock(asked.model, ladder_of(asked.model, folder, (100,)), ids[-1], asked.rounds),
            "blocks": lambda: against_stock(
                asked.model, ladder_of(asked.model, folder, (50, 100)), ids[-1], asked.rounds
            ),
            "depths": lambda: depths(asked.model, ladder_of(asked.model, folder, (100,)), ids, asked.rounds),
        }
        unknown = [part for part in asked.parts if part not in makers]
        if unknown:
            parser.error(f"no part {unknown[0]!r}; there are {', '.join(makers)}")
        made = {part: makers[part]() for part in asked.parts or makers}
    write(asked.model, layers, made)


def write(model: Path, layers: int, made: Figures) -> None:
    """Add to the results, and print."""
    path = RESULTS / "vllm.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    runs = before.get("runs", {}) if before.get("model") == model.name else {}
    told = {"commit": commit(), "command": module_command(), "date": time.strftime("%Y-%m-%d")}
    runs |= {part: {**told, **figures} for part, figures in made.items()}
    figures = {part: {name: value for name, value in run.items() if name not in told} for part, run in runs.items()}
    found = checks(figures)
    for check, reached in found.items():
        print(f"  {'reached ' if reached else 'MISSED  '} {check}")
    line = {
        "benchmark": "vllm",
        "model": model.name,
        "layers": layers,
        "machine": machine(),
        "runs": runs,
        "reached": found,
    }
    path.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
