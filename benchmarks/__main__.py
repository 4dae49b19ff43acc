"""`python -m benchmarks [NAME ...] [--model FOLDER]`: run all benchmarks, or those named, and write results/NAME.json.

`http` serves the bundled model, whatever is named."""

import argparse
from pathlib import Path

from benchmarks import decode, http, int8, one_set, prediction, scheduling, submodels, switching
from benchmarks.common import DEFAULT_MODEL

BENCHMARKS = {
    "decode": decode.run,
    "int8": int8.run,
    "submodels": submodels.run,
    "switching": switching.run,
    "one_set": one_set.run,
    "prediction": prediction.run,
    "scheduling": scheduling.run,
    "http": http.run,
}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all if none is named")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face model folder")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if set(asked.names) != {"http"} and not (asked.model / "config.json").exists():
        parser.error(f"{asked.model} holds no model; give one with --model FOLDER")
    for name, run in BENCHMARKS.items():
        if not asked.names or name in asked.names:
            print(f"== {name}: {asked.model.name}")
            run(asked.model)


if __name__ == "__main__":
    main()
