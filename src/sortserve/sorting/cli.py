"""`sortserve sort`: from a Hugging Face folder, or from nothing, to a folder that `sortserve serve` takes.

Two grades: trained by a recipe (`training.py`), or without training in minutes (`untrained.py`). Nothing heavy is
imported before the command runs.
"""

import argparse
from importlib import import_module
from pathlib import Path

from sortserve.engine.errors import SortingError
from sortserve.sorting import untrained

EXTRA = ("transformers", "accelerate", "peft", "tqdm")  # the `sort` extra of pyproject.toml
_EPILOG = """\
examples:
  sortserve sort ./Qwen2.5-0.5B --recipe lora.toml --data ./texts --to ./sorted   train exits and widths
  sortserve sort --recipe bundled.toml --data ./books --to ./model --minutes 76  from scratch, as the recipe says
  sortserve sort ./Qwen2.5-0.5B --no-training --to ./sorted                        in minutes, without training

The same command again goes on where a killed run stopped.
"""


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} must be minutes, over 0")
    return minutes


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def add_sort_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both grades."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL", help="Hugging Face folder; none: from scratch, by the recipe")
    add("--to", type=Path, required=True, metavar="OUT", help="folder to write the sorted model to")
    add("--recipe", type=Path, metavar="FILE", help="TOML: what is trained, and how")
    add("--data", type=Path, action="append", default=[], metavar="PATH", help="folder or file of text; may repeat")
    add("--minutes", type=_minutes, help="wall time for the whole run; the schedule ends by then")
    add("--updates", type=_count, help="instead of the recipe's, or of --minutes: repeats a run exactly")
    add("--seed", type=int, help="instead of the recipe's")
    add("--alone", action="store_true", help="train the full model only: what sorting costs it, by comparison")
    add("--fresh", action="store_true", help="start anew where OUT holds an unfinished run")
    add("--no-training", action="store_true", help="sort FFN neurons and search sub-models; weights are only permuted")
    untrained.add_arguments(parser)


def run_sort(args: argparse.Namespace) -> int:
    """Dispatch to the grade asked for. Raises SortingError for arguments that do not go together."""
    if args.no_training and args.model is None:
        raise SortingError("--no-training needs MODEL: there is nothing to sort without weights")
    if args.no_training:
        return untrained.run(args.model, args.to, args)
    if args.recipe is None:
        raise SortingError("give --recipe FILE to train by, or --no-training")
    try:
        training = import_module("sortserve.sorting.training")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise SortingError(f"{error.name} is not installed: pip install 'sortserve[sort]'") from error
    return int(training.run(args.model, args.to, args))
