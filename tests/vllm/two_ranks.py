"""Run by test_tensor_parallel.py as a program of its own: requests from standard input, on two tensor-parallel ranks."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Prompts in, a line of tokens out."""
    from tests.vllm.engines import start

    given = json.load(sys.stdin)
    engine = start(
        Path(given["model"]),
        ladder_path=Path(given["ladder"]),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    # by number of prompt tokens; JSON has text for keys
    engine.decider.program.update({int(length): changes for length, changes in given["program"].items()})
    arguments = [
        engine.free if submodel is None else {"sortserve_submodel": submodel} for submodel in given["submodels"]
    ]
    results = engine.generate(given["prompts"], arguments, 8)
    print(json.dumps([result.tokens for result in results]))
    engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
