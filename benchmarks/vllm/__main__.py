"""`python -m benchmarks.vllm [--model FOLDER] [--pairs N]`: what the backend costs and what it saves, on vLLM's CPU build.

1. Tokens per second at full depth against stock vLLM, in pairs, at 1 and 8 requests; also with FFNs in width blocks.
2. Milliseconds of a decode step in the layers, at full and at half depth.
3. The same of a batch over four depths, against the ideal: each segment's share of a whole step with as many rows.

Wants a quiet machine; ends in one JSON line. Engines live in one process, one after the other in each pair.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import DEFAULT_MODEL
from sortserve.engine.config import load_model_config
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.submodel import SubModel
from sortserve.engine.vllm.launch import engine_arguments

ARGUMENTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 512 << 20,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}
PROMPT_TOKENS, NEW_TOKENS = 64, 64


def ladder_of(model: Path, folder: Path, width_percents: Sequence[int]) -> Path:
    """Write a ladder of four depths at each of these widths; its file."""
    shape = load_model_config(model).shape
    depths = [round(shape.num_layers * quarter / 4) for quarter in (1, 2, 3, 4)]
    entries = [
        Entry(f"d{depth}-w{percent}", SubModel.make(depth, shape.ffn_width * percent // 100))
        for depth in depths
        for percent in width_percents
    ]
    path = folder / f"ladder-{'-'.join(map(str, width_percents))}.json"
    Ladder.of(shape, entries).dump(path)
    return path


class Subject:
    """An engine, and how long its model's forward took in each decode step."""

    def __init__(self, **arguments: Any) -> None:
        from vllm import LLM

        self.llm: Any = LLM(**arguments)
        model = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self.forward_ms: list[float] = []
        forward = model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = forward(*args, **kwargs)
            if out.shape[0] <= ARGUMENTS["max_num_seqs"]:  # a prompt has more rows
                self.forward_ms.append((time.perf_counter() - began) * 1e3)
            return out

        model.forward = timed

    def run(self, submodels: Sequence[str | None]) -> float:
        """One request each; tokens per second from the first step to the last."""
        from vllm import SamplingParams

        self.forward_ms.clear()
        prompts = [
            {"prompt_token_ids": [(7 * number + i) % 1000 + 5 for i in range(PROMPT_TOKENS)]}
            for number in range(len(submodels))
        ]
        params = [
            SamplingParams(
                max_tokens=NEW_TOKENS,
                temperature=0.0,
                ignore_eos=True,
                extra_args=None if submodel is None else {"sortserve_submodel": submodel},
            )
            for submodel in submodels
        ]
        began = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return len(submodels) * NEW_TOKENS / (time.perf_counter() - began)

    def step_ms(self, submodels: Sequence[str], repeats: int) -> float:
        """Median milliseconds in the layers of a decode step."""
        taken: list[float] = []
        for _ in range(repeats):
            self.run(submodels)
            taken += self.forward_ms[1:]
        return statistics.median(taken)


def ratio(ours: Subject, stock: Subject, requests: int, full: str, pairs: int) -> dict[str, float]:
    """Ours over stock, in tokens per second: median and range over pairs whose order alternates."""
    ratios = []
    for number in range(pairs):
        if number % 2:
            mine, theirs = ours.run([full] * requests), stock.run([None] * requests)
        else:
            theirs, mine = stock.run([None] * requests), ours.run([full] * requests)
        ratios.append(mine / theirs)
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def main() -> None:
    """Parse, run, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face model folder")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each comparison, and repeats of each step time")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    with tempfile.TemporaryDirectory() as folder:
        depths, widths = (ladder_of(asked.model, Path(folder), percents) for percents in ((100,), (50, 100)))
        stock = Subject(model=str(asked.model), enforce_eager=True, async_scheduling=False, **ARGUMENTS)
        ours = Subject(**engine_arguments(asked.model, cpu=True, ladder_path=depths, **ARGUMENTS))
        blocks = Subject(**engine_arguments(asked.model, cpu=True, ladder_path=widths, **ARGUMENTS))
    layers = load_model_config(asked.model).shape.num_layers
    ids = [f"d{round(layers * quarter / 4)}-w100" for quarter in (1, 2, 3, 4)]
    full, half = ids[3], ids[1]
    for subject, submodel in ((stock, None), (ours, full), (blocks, full)):
        subject.run([submodel])  # warm
    result: dict[str, Any] = {"model": asked.model.name, "layers": layers}
    for requests in (1, 8):
        result[f"full_over_stock_{requests}"] = ratio(ours, stock, requests, full, asked.pairs)
        result[f"full_in_blocks_over_stock_{requests}"] = ratio(blocks, stock, requests, full, asked.pairs)
        times = {name: ours.step_ms([name] * requests, asked.pairs) for name in (full, half)}
        result[f"layers_ms_{requests}"] = {**times, "half_is_faster_by": times[full] / times[half]}
    mixed = ours.step_ms([*ids, *ids], asked.pairs)
    whole = [ours.step_ms([full] * rows, asked.pairs) for rows in (8, 6, 4, 2)]  # rows of the four segments
    ideal = sum(whole) / len(whole)
    result["mixed"] = {"ms": mixed, "ideal_ms": ideal, "over_ideal": mixed / ideal}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
