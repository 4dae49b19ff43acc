"""`sortserve ladder measure` and `sortserve ladder import`. What computes is imported when a command runs."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config

if TYPE_CHECKING:
    from sortserve.sorting.measuring import Extras

_MEASURE = """\
examples:
  sortserve ladder measure ./model
  sortserve ladder measure ./model --held-out books=./books --held-out maths=./gsm8k/test.jsonl
  sortserve ladder measure ./model --task gsm8k=./gsm8k/test.jsonl --questions 100
  sortserve ladder measure ./model --lm-eval arc_easy --lm-eval-python ./harness/bin/python --limit 200

It measures the entries of ladder.json (or of --ladder), drops what is no better than something cheaper, and writes
ladder.json and ladder.svg into MODEL, or to --to. Interrupted, it goes on with the task scores that it had.
"""
_IMPORT = """\
examples:
  sortserve ladder import ./model --from evopress layer_drop_config.txt
  sortserve ladder import ./model --from layerskip exits.json --replace

The entries are added to ladder.json, unmeasured; measure them with `sortserve ladder measure`.
"""


def add_text_arguments(parser: argparse.ArgumentParser, tokens: int) -> None:
    """What both `ladder measure` and `sort --no-training` say of held-out text."""
    add = parser.add_argument
    add(
        "--held-out",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="file or folder of text to measure on (.txt, .md, .py, .jsonl, .jsonl.gz), a domain each; may repeat; "
        "default: prose, maths, dialogue and code that come with the package",
    )
    add("--tokens", type=_positive, default=tokens, help=f"to measure on, per domain; default: {tokens}")
    add("--window", type=_positive, default=256, help="most tokens of one text; default: 256")
    add(
        "--pairs",
        type=int,
        default=2,
        metavar="N",
        help="entries measured as prompt and answer of one another; default: 2",
    )


def add_measure_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ladder measure`."""
    parser.epilog = _MEASURE
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face model folder")
    add("--ladder", type=Path, metavar="FILE", help="entries to measure; default: ladder.json in the model folder")
    add("--to", type=Path, metavar="FILE", help="ladder to write; default: ladder.json in the model folder")
    add_text_arguments(parser, 2048)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the checkpoint's")
    add("--quality", default="loss", help="what quality is made of: loss, or a task that is run; default: loss")
    add(
        "--task", action="append", default=[], metavar="NAME=FILE", help="gsm8k or humaneval, by generation; may repeat"
    )
    add("--questions", type=_positive, default=100, help="of each task; default: 100")
    add(
        "--run-generated-code",
        action="store_true",
        help="humaneval runs code that the model writes, in limited processes of its own; it needs this word",
    )
    add("--lm-eval", metavar="TASK,...", help="tasks of lm-evaluation-harness")
    add("--lm-eval-python", type=Path, metavar="PYTHON", help="of the environment that has lm-eval[api]")
    add("--lm-eval-include", type=Path, metavar="DIR", help="folder with tasks of your own")
    add("--limit", type=_positive, help="questions of each lm-eval task; default: all")
    add("--time", action="store_true", help="measure milliseconds per token here, too")
    add("--keep-dominated", action="store_true", help="keep entries that are no better than something cheaper")
    add("--seed", type=int, default=0, help="which texts are taken; default: 0")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ladder import`."""
    parser.epilog = _IMPORT
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face model folder")
    add("files", type=Path, nargs="+", metavar="FILE", help="what the other tool wrote")
    add("--from", dest="form", required=True, choices=("evopress", "llm-drop", "layerskip", "matformer"))
    add("--to", type=Path, metavar="FILE", help="ladder to write; default: ladder.json in the model folder")
    add("--replace", action="store_true", help="start from no entries instead of the ladder that is there")


def run_measure(args: argparse.Namespace) -> int:
    """Measure and write the ladder. Raises StartupError."""
    from sortserve.engine.text import Tokenizer
    from sortserve.sorting import measuring, texts
    from sortserve.sorting.decoder import Decoder
    from sortserve.sorting.machine import dtype_of, keep_freed_memory

    extras = _extras(args)
    shape = load_model_config(args.model).shape
    source = args.ladder or args.model / "ladder.json"
    if args.ladder is None and not source.is_file():
        raise SortingError(
            f"{source} is not there: give --ladder, or make one with `sortserve sort` or `ladder import`"
        )
    ladder = Ladder.load(source, shape)
    domains = texts.load_domains(
        args.held_out or texts.built_in("held_out"),
        Tokenizer.load(args.model),
        window=args.window,
        tokens=args.tokens,
        seed=args.seed,
    )
    keep_freed_memory()
    decoder = Decoder.load(args.model, dtype_of(args.model, args.dtype), args.window)
    candidates = [measuring.Candidate(entry.submodel, entry.method, entry.id) for entry in ladder.entries]
    found = measuring.measure(
        decoder,
        domains,
        candidates,
        quality=args.quality,
        pairs=args.pairs,
        extras=extras,
        folder=args.model,
        keep_dominated=args.keep_dominated,
        progress=Told(),
    )
    found.write(_target(args), f"{args.model.name}: quality against cost")
    if extras.unfinished is not None:
        extras.unfinished.unlink(missing_ok=True)
    tell(found)
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Add entries of other tools' files to the ladder. Raises StartupError."""
    from sortserve.sorting.folder import new_file
    from sortserve.sorting.importers import import_file

    shape = load_model_config(args.model).shape
    target = _target(args)
    before = Ladder.load(target, shape) if target.is_file() else None
    start = before.entries if before is not None and not args.replace else ()
    by_submodel = {entry.submodel: entry for entry in start}
    taken = {entry.id for entry in start}
    added = 0
    for path in args.files:
        for one in import_file(args.form, path, shape):
            if one.submodel in by_submodel:
                continue
            name = _free_id(one.id or one.submodel.name(shape) or f"{one.method}-{path.stem}", taken)
            taken.add(name)
            by_submodel[one.submodel] = Entry(name, one.submodel, method=one.method)
            added += 1
    with new_file(target) as path:
        importance = () if before is None else before.layer_importance  # of the weights, not of the entries
        Ladder.of(shape, list(by_submodel.values()), layer_importance=importance).dump(path)
    print(f"{target}: {added} entries added, {len(by_submodel)} in all; not measured yet")
    return 0


class Told:
    """Progress on stderr, at most one line a second, with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last = 0.0

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._last >= 1.0:
            self._last = now
            print(f"[{now - self._started:5.0f} s] {line}", file=sys.stderr, flush=True)


def tell(found: "object") -> None:
    """The ladder as a table on stdout."""
    from sortserve.sorting.measuring import Measurement
    from sortserve.sorting.quality import not_monotone

    assert isinstance(found, Measurement)
    ladder = found.ladder
    full = ladder.costs[ladder.full].weight_bytes
    for entry, cost in zip(ladder.entries, ladder.costs, strict=True):
        assert entry.quality is not None
        parts = [f"{entry.id:28s} {cost.weight_bytes / full:5.0%} of bytes  quality {entry.quality.value:.3f}"]
        parts += [
            f"{name}: loss {figures.loss.value:.3f}, agreement {figures.agreement.value:.3f}, KL {figures.kl.value:.3f}"
            for name, figures in entry.domains.items()
        ]
        parts += [
            f"{name} {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" for name, score in entry.scores.items()
        ]
        parts += [] if entry.token_ms is None else [f"{entry.token_ms:.1f} ms/token"]
        print("; ".join([*parts, "degraded"] if entry.degraded else parts))
    if found.left_out:
        print(f"left out, no better than something cheaper: {', '.join(entry.id for entry in found.left_out)}")
    for cheap, costly in not_monotone(ladder):
        print(f"warning: {costly} costs more than {cheap} and is no better", file=sys.stderr)


def _extras(args: argparse.Namespace) -> "Extras":
    from sortserve.sorting.answers import tasks
    from sortserve.sorting.lm_eval import LmEval
    from sortserve.sorting.measuring import Extras

    found = tasks(args.task, args.questions)
    if any(task.name == "humaneval" for task in found) and not args.run_generated_code:
        raise SortingError("humaneval runs code that the model writes; say --run-generated-code if that is wanted")
    if bool(args.lm_eval) != bool(args.lm_eval_python):
        raise SortingError("--lm-eval needs --lm-eval-python, and the other way round")
    harness = None
    if args.lm_eval:
        # absolute, and not resolved: a virtual environment's python is a link out of it
        python = args.lm_eval_python.absolute()
        harness = LmEval(python, tuple(args.lm_eval.split(",")), args.limit, args.lm_eval_include, args.dtype)
    target = _target(args)
    return Extras(tuple(found), harness, args.time, args.dtype, target.with_name(f"{target.stem}.unfinished.json"))


def _target(args: argparse.Namespace) -> Path:
    """The ladder to write."""
    return Path(args.to or args.model / "ladder.json")


def _free_id(wanted: str, taken: set[str]) -> str:
    free, number = wanted, 2
    while free in taken:
        free, number = f"{wanted}-{number}", number + 1
    return free


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 10**12:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
