"""`sortserve sort MODEL --no-training`: how long it takes, and that the full model's tokens do not change.

    python -m benchmarks.sorting.no_training [--model FOLDER] --to OUT [arguments of `sortserve sort --no-training`]

Target: at most 15 minutes on 2 cores for the 0.5B model. Tokens are greedy, in float32, of a few prompts.
"""

import argparse
import time
from pathlib import Path

from benchmarks.common import DEFAULT_MODEL, report
from sortserve.engine.ladder import Ladder
from sortserve.engine.llm import LLM
from sortserve.engine.model_config import load_model_config
from sortserve.engine.sampling import SamplingParams
from sortserve.sorting import untrained

LIMIT_SECONDS = 15 * 60
NUM_TOKENS = 24
PROMPTS = (
    "def fibonacci(n):\n",
    "It was a bright cold day in April, and",
    "Question: A shop sells 12 pens for $3. What do 20 pens cost?\nAnswer:",
    "Once upon a time there was",
)


def main() -> None:
    """Sort, compare, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sorting.no_training", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int)
    untrained.add_arguments(parser)
    asked = parser.parse_args()
    before = answers(asked.model)
    started = time.monotonic()
    untrained.run(asked.model, asked.to, asked)
    seconds = time.monotonic() - started
    after = answers(asked.to)
    ladder = Ladder.load(asked.to / "ladder.json", load_model_config(asked.model).shape)
    print(f"sorted in {seconds:.0f} s; {sum(map(len, after))} tokens of the full model compared")
    figures: dict[str, object] = {
        "seconds": round(seconds, 1),
        "tokens_compared": sum(map(len, after)),
        "entries": {
            entry.id: {
                "bytes_share": round(cost.weight_bytes / ladder.costs[-1].weight_bytes, 4),
                "quality": entry.quality and entry.quality.value,
                "degraded": entry.degraded,
                "widths": list(entry.submodel.widths),
                "skip_attention": list(entry.submodel.skip_attention),
            }
            for entry, cost in zip(ladder.entries, ladder.costs, strict=True)
        },
    }
    checks = {
        "at most 15 minutes": seconds <= LIMIT_SECONDS,
        "the full model's tokens do not change": before == after,
    }
    report("untrained_sort", figures, checks)


def answers(folder: Path) -> list[tuple[int, ...]]:
    """Greedy tokens of the full model, in float32: rounding of bfloat16 would turn near-ties with the order of sums."""
    llm = LLM(folder, dtype="float32", kv_bytes=1 << 27, max_model_len=256, warmup=False)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    full = llm.engine.info.ladder.entries[-1].id
    return [one.token_ids for one in llm.generate(list(PROMPTS), params, submodel=full)]


if __name__ == "__main__":
    main()
