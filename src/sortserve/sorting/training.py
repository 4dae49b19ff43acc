"""`sortserve sort` by training: from a recipe, text and perhaps a model to a folder that `sortserve serve` takes.

Contract: OUT gets weights, config, tokenizer, ladder.json (unmeasured: `sortserve ladder measure` fills it in),
recipe.toml as it was resolved, training.jsonl and training.json (what was done, on what, how fast). It is written beside
and renamed at the end. Until then OUT/unfinished holds the run, and the same command goes on with it.
"""

import argparse
import hashlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from sortserve.engine.checkpoint import Checkpoint
from sortserve.engine.errors import SortingError
from sortserve.engine.model_config import load_model_config
from sortserve.sorting import data, lora, new_model, result
from sortserve.sorting.machine import keep_freed_memory
from sortserve.sorting.nested import check_family
from sortserve.sorting.recipe import Recipe, read_recipe, write_recipe
from sortserve.sorting.sampler import Sampler
from sortserve.sorting.saved_run import first_not_finite
from sortserve.sorting.trainer import Parts, train

RESERVE_SECONDS = 150.0
"""Of --minutes, kept for what comes after training: measuring on held-out text and writing."""


def run(model_folder: Path | None, out: Path, args: argparse.Namespace) -> int:
    """The command. Returns 0, or 3 if it was stopped and can go on. Raises SortingError."""
    began = time.monotonic()
    recipe = resolve(read_recipe(args.recipe), args)
    if (model_folder is None) == (recipe.model is None):
        raise SortingError("give either MODEL or a recipe with [model]: trained further, or made from nothing")
    keep_freed_memory()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SortingError(f"{out}: {error.strerror}") from error
    if args.fresh:
        shutil.rmtree(out / "unfinished", ignore_errors=True)
    accelerator = Accelerator()
    texts = data.read_texts(args.data, recipe.data)
    try:
        tokenizer, parts = prepare(recipe, texts, model_folder, out, accelerator)
    except OSError as error:  # no room for the encoded text, say
        raise SortingError(f"{out}: {error}") from error
    print(result.opening(parts, texts), file=sys.stderr)
    seconds = None
    if args.minutes is not None:
        reserve = min(RESERVE_SECONDS, 15 * args.minutes)
        # what was spent on reading and encoding is gone; what a killed run spent on training, the clock knows
        seconds = max(1.0, 60 * args.minutes - reserve - (time.monotonic() - began))
    updates = recipe.train.updates or (0 if seconds is not None else _one_epoch(parts))
    with _stopping() as stop:
        progress, optimizer = train(parts, updates, seconds, stop)
    if not progress.done:
        print(f"stopped after update {progress.update}; the same command goes on", file=sys.stderr)
        return 3
    result.write(parts, texts, tokenizer, progress, optimizer, model_folder, " ".join(sys.argv[1:]))
    return 0


def resolve(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line says instead."""
    changes: dict[str, Any] = {}
    if args.seed is not None:
        changes["seed"] = args.seed
    if args.alone:
        changes["alone"] = True
    if args.updates is not None:
        changes["train"] = msgspec.structs.replace(recipe.train, updates=args.updates)
    return msgspec.structs.replace(recipe, **changes)


def prepare(
    recipe: Recipe, texts: data.Texts, model_folder: Path | None, out: Path, accelerator: Accelerator
) -> tuple[Tokenizer, Parts]:
    """Tokenizer, packed tokens and the model, ready to train. What takes long is kept in OUT/unfinished."""
    key = hashlib.sha256(f"{write_recipe(recipe)}{texts.digest}{_identity(model_folder)}".encode()).hexdigest()
    torch.manual_seed(recipe.seed)
    dtype = getattr(torch, recipe.train.dtype)
    if model_folder is None:
        tokenizer = new_model.tokenizer(texts, recipe, out / "unfinished")
        model = new_model.make(recipe, tokenizer)
    else:
        tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
        model = load(model_folder)
    check_family(model)
    model = model.to(accelerator.device, dtype).train()
    ranks = None
    if recipe.lora is not None:
        ranks = lora.add_adapters(model, recipe.lora)
    config = model.config
    max_rank = recipe.lora.rank if recipe.lora is not None and recipe.lora.sorted_ranks else 0
    sampler = Sampler.make(
        recipe.grid,
        recipe.method,
        config.num_hidden_layers,
        config.intermediate_size,
        recipe.seed,
        recipe.alone,
        max_rank,
    )
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    tokens = _encoded(tokenizer, texts, eos, recipe, out / "unfinished")
    block = recipe.train.long_window if recipe.train.long_every else recipe.train.window
    packed = data.Packed(tokens, block, recipe.seed)
    bos = data.bos_of(tokenizer)
    return tokenizer, Parts(
        model, sampler, packed, bos, recipe, out, key, accelerator, ranks, recipe.train.checkpointed
    )


def load(folder: Path) -> Any:
    """A transformers model. Raises ModelFolderError or SortingError if it is truncated or holds NaN."""
    from transformers import AutoModelForCausalLM

    Checkpoint.open(folder, load_model_config(folder))  # names the file and the tensor that is wrong
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as error:
        raise SortingError(f"{folder}: {type(error).__name__}: {error}") from error
    bad = first_not_finite(dict(model.named_parameters()))
    if bad:
        raise SortingError(f"{folder}: {bad} holds NaN or infinity")
    return model


def _encoded(tokenizer: Tokenizer, texts: data.Texts, eos: int, recipe: Recipe, folder: Path) -> Any:
    """Tokens of the training text, memory-mapped from OUT/unfinished: encoding 70 MB takes half a minute."""
    key = hashlib.sha256(
        f"{texts.digest}{tokenizer.to_str()}{recipe.data.max_tokens}{recipe.seed}".encode()
    ).hexdigest()
    path = folder / f"tokens-{key[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        writing = folder / ".writing.npy"
        np.save(writing, data.encode(tokenizer, texts, eos, recipe.data.max_tokens, recipe.seed))
        writing.rename(path)
    return np.load(path, mmap_mode="r")


def _identity(model_folder: Path | None) -> str:
    """Tells one source model from another: names and sizes of its files."""
    if model_folder is None:
        return ""
    return " ".join(f"{p.name}:{p.stat().st_size}" for p in sorted(model_folder.glob("*.safetensors")))


def _one_epoch(parts: Parts) -> int:
    per_update = parts.recipe.train.tokens_per_pass * parts.recipe.method.passes
    return max(1, parts.packed.num_blocks * parts.packed.block // per_update)


@contextmanager
def _stopping() -> Iterator[Any]:
    """SIGTERM and Ctrl-C end the run after the update in progress, saved; a second one ends it at once."""
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where signals are not ours
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
