"""`sortserve ladder head`: fits the depth head of a model's ladder and writes it beside it."""

import argparse
from dataclasses import replace
from pathlib import Path

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import DepthHeadEntry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.sorting.ladder_cli import Told

HEAD_FILE = "depth_head.st"  # safetensors; not by that ending: vLLM loads every such file of a folder as weights
_EPILOG = """\
examples:
  sortserve ladder head ./model
  sortserve ladder head ./model --fit books=passages.jsonl --held-out books=others.jsonl --tokens 200000

It writes depth_head.st and names it in ladder.json. What changes the ladder's exits afterwards drops it.
"""


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ladder head`."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face model folder with a ladder.json")
    text = (
        "file or folder of text (.txt, .md, .py, .jsonl, .jsonl.gz); may repeat; default: what comes with the package"
    )
    add("--fit", action="append", default=[], metavar="[NAME=]PATH", help=f"to fit on: {text}")
    add("--held-out", action="append", default=[], metavar="[NAME=]PATH", help=f"to calibrate and to judge on: {text}")
    add("--tokens", type=_positive, default=100_000, help="to fit on, per source; default: 100000")
    add("--window", type=_positive, default=256, help="most tokens of one text; default: 256")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the checkpoint's")
    add("--seed", type=int, default=0, help="of the texts, the start and the order; default: 0")


def run_head(args: argparse.Namespace) -> int:
    """Fit, calibrate, judge, write. Raises StartupError."""
    from sortserve.engine.text import Tokenizer
    from sortserve.sorting import depth_head, provenance, texts
    from sortserve.sorting.decoder import Decoder
    from sortserve.sorting.folder import new_file
    from sortserve.sorting.machine import dtype_of, keep_freed_memory

    path = args.model / "ladder.json"
    if not path.is_file():
        raise SortingError(f"{path} is not there: make one with `sortserve sort` or `ladder import`")
    ladder = Ladder.load(path, load_model_config(args.model).shape)
    tokenizer, told = Tokenizer.load(args.model), Told()

    def load(sources: list[str], kind: str, tokens: int) -> list[texts.Domain]:
        return texts.load_domains(
            sources or texts.built_in(kind), tokenizer, window=args.window, tokens=tokens, seed=args.seed
        )

    fitted, held_out = load(args.fit, "calibration", args.tokens), load(args.held_out, "held_out", args.tokens)
    halves = [[replace(domain, texts=domain.texts[part::2]) for domain in held_out] for part in (0, 1)]
    if not any(domain.texts for domain in halves[1]):
        raise SortingError("one text of --held-out is too few: one half calibrates, the other one judges")
    keep_freed_memory()
    decoder = Decoder.load(args.model, dtype_of(args.model, args.dtype), args.window)
    samples, calibration, judged = (depth_head.collect(decoder, ladder, each, told) for each in (fitted, *halves))
    raw = depth_head.fit(decoder, ladder, samples, args.seed, told)
    head = depth_head.calibrate(raw, decoder, calibration)
    before, after = (depth_head.judge(each, decoder, judged) for each in (raw, head))
    entry = DepthHeadEntry(
        file=HEAD_FILE,
        layer_share=round(head.layer_share(ladder.shape), 5),
        loss=round(after.loss, 4),
        loss_blind=round(after.loss_blind, 4),
        calibration_error=round(after.calibration_error, 4),
        tokens=len(samples),
        data=", ".join(f"{domain.name} ({len(domain.texts)} texts of {domain.origin})" for domain in fitted),
        command=provenance.command(),
    )
    with new_file(args.model / HEAD_FILE) as target:
        head.save(target)
    with new_file(path) as target:
        replace(ladder, depth_head=entry).dump(target)
    print(f"{args.model / HEAD_FILE}: fitted on {len(samples)} tokens, reads {entry.layer_share:.2%} of a layer a row")
    print(
        f"on {len(judged)} other tokens: {after.loss:.3f} nats of the exit needed, {after.loss_blind:.3f} blind; "
        f"calibration error {before.calibration_error:.4f} as fitted, {after.calibration_error:.4f} calibrated"
    )
    return 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 10**12:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
