"""Text for training: documents from files, a split by file, a tokenizer, and packed tokens.

Contract: a file is a document, a line of a .jsonl file is one too. The split is by file name and by nothing else, so it
is the same on every machine; what repeats a held-out file is left out of training. `Packed.windows` is a pure function of
the seed and a number, so a resumed run reads on where the killed one was.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from sortserve.engine.errors import SortingError
from sortserve.sorting.recipe import Data

BOS, EOS = "<|bos|>", "<|eos|>"
SUFFIXES = (".md", ".txt", ".jsonl")
REPEATS = 3
"""A file that shares so many long paragraphs with held-out ones repeats them (a story that is in a collection too)."""


@dataclass(frozen=True)
class Texts:
    """Documents by file name, split; `left_out` repeat a held-out file."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    left_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained on, names included."""
        found = hashlib.sha256()
        for name, documents in self.train.items():
            found.update(name.encode() + b"\0" + "\0".join(documents).encode() + b"\0")
        return found.hexdigest()


def read_texts(paths: Sequence[Path], data: Data) -> Texts:
    """Raises SortingError if there is nothing to read or a line of a .jsonl file has not the fields."""
    files: dict[str, Path] = {}
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
        files |= {str(p.relative_to(path) if path.is_dir() else p.name): p for p in inside}
    documents = {name: _documents(files[name], data) for name in sorted(files)}
    documents = {name: found for name, found in documents.items() if found}
    if not documents:
        raise SortingError(
            f"no text in {', '.join(map(str, paths)) or 'nothing'}: files of {', '.join(SUFFIXES)} are read"
        )
    held_out = {}
    if data.hold_out_every:
        names = list(documents)[data.hold_out_every - 1 :: data.hold_out_every]
        held_out = {name: documents.pop(name) for name in names}
    known = set().union(*(_long_paragraphs(text) for found in held_out.values() for text in found))
    left_out = [
        n for n, found in documents.items() if len(known & set().union(*map(_long_paragraphs, found))) >= REPEATS
    ]
    train = {name: found for name, found in documents.items() if name not in left_out}
    if not train:
        raise SortingError(f"all {len(documents)} files repeat held-out ones, or too few are left to train on")
    return Texts(train, held_out, tuple(left_out))


def _documents(path: Path, data: Data) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SortingError(f"{path}: {error}") from error
    if path.suffix != ".jsonl":
        # a title header, as the collections of public-domain books have it, is no text of the book
        return [text] if (text := re.split(r"\n-{5,}\n", content, maxsplit=1)[-1].strip()) else []
    fields = data.fields or ["text"]
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            found.append("\n\n".join(row[name] for name in fields))
        except (ValueError, KeyError, TypeError) as error:
            raise SortingError(f"{path}:{number}: no text fields {fields}: {error!r}") from error
    return found


def _long_paragraphs(text: str) -> set[str]:
    return {re.sub(r"\W+", " ", p).strip().lower() for p in text.split("\n\n") if len(p) >= 120}


def train_tokenizer(texts: Texts, vocab: int, max_bytes: int, seed: int) -> Tokenizer:
    """Byte-level BPE: the alphabet holds all 256 bytes, so no input is ever unknown. BOS opens every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_up_to(texts, max_bytes, seed), trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return tokenizer


def _up_to(texts: Texts, limit: int, seed: int) -> Iterator[str]:
    names = list(texts.train)
    random.Random(seed).shuffle(names)
    for name in names:
        for document in texts.train[name]:
            if limit <= 0:
                return
            limit -= len(document)
            yield document


def bos_of(tokenizer: Tokenizer) -> int | None:
    """What the tokenizer opens every text with, if anything: training windows are opened alike."""
    ids = tokenizer.encode("").ids
    return ids[0] if ids else None


def encode(tokenizer: Tokenizer, texts: Texts, eos: int, max_tokens: int, seed: int) -> npt.NDArray[np.int32]:
    """All documents in a drawn order, each ended by EOS."""
    names = list(texts.train)
    random.Random(seed).shuffle(names)
    documents = [document for name in names for document in texts.train[name]]
    parts: list[npt.NDArray[np.int32]] = []
    have = 0
    for start in range(0, len(documents), 8):
        for found in tokenizer.encode_batch(documents[start : start + 8], add_special_tokens=False):
            parts.append(np.asarray([*found.ids, eos], dtype=np.int32))
            have += len(parts[-1])
        if max_tokens and have >= max_tokens:
            break
    return np.concatenate(parts)


@dataclass
class Packed:
    """Tokens cut in blocks of the longest window; an epoch takes each once, in an order drawn from seed and epoch."""

    tokens: npt.NDArray[np.int32]
    block: int
    seed: int
    _order: tuple[int, Any] = field(default=(-1, None))

    def __post_init__(self) -> None:
        if len(self.tokens) < self.block:
            raise SortingError(f"{len(self.tokens)} tokens of text, one window takes {self.block}")

    @property
    def num_blocks(self) -> int:
        """Of an epoch."""
        return len(self.tokens) // self.block

    def windows(self, number: int, num_tokens: int, window: int) -> Tensor:
        """Batch `number` (from 0) of so many tokens: [windows, window]."""
        per_batch = num_tokens // self.block
        blocks = [self._block(number * per_batch + i) for i in range(per_batch)]
        return torch.from_numpy(np.concatenate(blocks).astype(np.int64)).reshape(-1, window)

    def _block(self, number: int) -> npt.NDArray[np.int32]:
        epoch, place = divmod(number, self.num_blocks)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_blocks))
        start = int(self._order[1][place]) * self.block
        return self.tokens[start : start + self.block]


def inputs_and_targets(windows: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """What goes in and what is to come out, both [windows, length]. With a BOS every token of a window is a target."""
    if bos is None:
        return windows[:, :-1], windows[:, 1:]
    return torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1), windows
