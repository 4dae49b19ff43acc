"""Texts for calibration and measuring: files and folders in, token windows by domain out.

A source is `NAME=PATH` or `PATH` (its name is the file's or folder's). Files: `.txt`, `.md`, `.py` are text; each line
of `.jsonl` (also `.jsonl.gz`) is an object with `question` and `answer` (GSM8K: only the answer is scored),
`prompt` and `canonical_solution` (HumanEval: all is scored), `messages` (a chat: the last answer is scored), or `text`.
Questions and chats go through the model's chat template if it has one, as they would when served.
"""

import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sortserve.engine.errors import RequestError, SortingError
from sortserve.engine.text import Tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")
_CHARS_PER_TOKEN = 8  # more than any tokenizer needs on average, so that a cut text still fills its window
_CALCULATOR = re.compile(r"<<[^>]*>>")  # GSM8K's annotations, which no reader ever sees
BUILT_IN = Path(__file__).parent / "text_files"
_CODE = {"calibration": "engine", "held_out": "server"}


@dataclass(frozen=True)
class Text:
    """Token ids; tokens [0, num_prompt) are context only. `num_prompt` is at least 1: nothing predicts the first."""

    tokens: tuple[int, ...]
    num_prompt: int

    @property
    def num_scored(self) -> int:
        """Tokens that have a loss."""
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True)
class Domain:
    """Texts of one kind; `digest` is the SHA-256 of their tokens, `origin` where they are from."""

    name: str
    texts: tuple[Text, ...]
    origin: str = ""

    @property
    def num_scored(self) -> int:
        """Tokens that have a loss."""
        return sum(text.num_scored for text in self.texts)

    @property
    def digest(self) -> str:
        """SHA-256 over all tokens, so that a ladder tells what it was measured on."""
        content = json.dumps([[text.num_prompt, *text.tokens] for text in self.texts])
        return hashlib.sha256(content.encode()).hexdigest()

    def split(self, tokens: int) -> tuple["Domain", "Domain"]:
        """As many of the first texts as it takes for `tokens` to be scored, and the others."""
        count, total = 0, 0
        while count < len(self.texts) and total < tokens:
            total += self.texts[count].num_scored
            count += 1
        return (
            Domain(self.name, self.texts[:count], self.origin),
            Domain(self.name, self.texts[count:], self.origin),
        )


@dataclass(frozen=True)
class Sample:
    """A text before tokenizing: a prompt that is context only (may be empty), and what is scored."""

    prompt: str
    answer: str
    is_chat: bool = False  # the prompt is a user's turn
    turns: tuple[Mapping[str, Any], ...] = ()  # a chat's turns before the answer; else empty


@dataclass(frozen=True)
class Batch:
    """Texts side by side, padded on the right. `places`: which text of the domain each row is."""

    tokens: Tensor  # int64 [texts, tokens]
    scored: Tensor  # bool [texts, tokens]: the token here has a loss, predicted by the row before it
    is_prompt: Tensor  # bool [texts, tokens]
    places: tuple[int, ...]


def load_domains(
    sources: Sequence[str], tokenizer: Tokenizer, *, window: int, tokens: int, seed: int = 0
) -> list[Domain]:
    """One domain per source, texts of at most `window` tokens until `tokens` are scored.

    Raises SortingError for a source that is missing, malformed or has no text.
    """
    domains = []
    for source in sources:
        name, _, path = source.rpartition("=")
        folder = Path(path)
        name = name or folder.name.split(".")[0]
        samples = list(read_samples(folder, window * _CHARS_PER_TOKEN, seed))
        random.Random(seed).shuffle(samples)
        texts, total = [], 0
        for sample in samples:
            text = encode(sample, tokenizer, window)
            if text is not None and text.num_scored >= 8:
                texts.append(text)
                total += text.num_scored
            if total >= tokens:
                break
        if not texts:
            raise SortingError(f"{path} holds no text of at least 8 tokens; give files of {', '.join(SUFFIXES)}")
        domains.append(Domain(name, tuple(texts), f"{folder.name}"))
    names = [domain.name for domain in domains]
    if len(set(names)) != len(names):
        raise SortingError(f"two sources of one name among {names}; write NAME=PATH")
    return domains


def built_in(kind: str) -> list[str]:
    """Sources of the texts that come with the package, `calibration` or `held_out`: prose, maths and dialogue from
    files (text_files/README.md tells whose), and as code the package's own."""
    files = [f"{path.name.split('.')[0]}={path}" for path in sorted((BUILT_IN / kind).iterdir()) if _suffix(path)]
    return [*files, f"code={BUILT_IN.parent.parent / _CODE[kind]}"]


def batches(domain: Domain, most_tokens: int) -> Iterator[Batch]:
    """The domain's texts in order of length, at most `most_tokens` with padding at a time."""
    order = sorted(range(len(domain.texts)), key=lambda place: -len(domain.texts[place].tokens))
    while order:
        longest = len(domain.texts[order[0]].tokens)
        count = max(1, most_tokens // longest)
        chosen, order = order[:count], order[count:]
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        scored = torch.zeros(len(chosen), longest, dtype=torch.bool)
        is_prompt = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, place in enumerate(chosen):
            text = domain.texts[place]
            tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
            scored[row, text.num_prompt : len(text.tokens)] = True
            is_prompt[row, : text.num_prompt] = True
        yield Batch(tokens, scored, is_prompt, tuple(chosen))


def mixed_batches(domains: Sequence[Domain], tokens_each: int, count: int) -> list[Batch]:
    """At most `count` batches of one text per domain, cut to `tokens_each`; all their tokens but the first are scored,
    prompts too: the full model is the judge here, not the text. The longest texts come first."""
    ordered = [sorted(domain.texts, key=lambda text: -len(text.tokens)) for domain in domains]
    found = []
    for number in range(min(count, max(map(len, ordered)))):
        cut = [texts[number].tokens[:tokens_each] for texts in ordered if number < len(texts)]
        texts = tuple(Text(tokens, 1) for tokens in cut)
        found += list(batches(Domain("mixed", texts), len(texts) * tokens_each))
    return found


def read_samples(path: Path, most_chars: int, seed: int = 0) -> Iterator[Sample]:
    """Samples of a file, or of all files of a folder by name. A long text gives one piece per file of a folder, several
    spread ones if it is alone. Raises SortingError."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and _suffix(file)]
        for file in files:
            yield from _read_file(file, most_chars, 1, seed)
        return
    if not path.is_file():
        raise SortingError(f"{path} is neither a file nor a folder")
    yield from _read_file(path, most_chars, 1_000, seed)


def encode(sample: Sample, tokenizer: Tokenizer, window: int) -> Text | None:
    """Tokens of a sample, cut to `window`; None if nothing of it is left to score."""
    if sample.is_chat and tokenizer.chat_template is not None:
        turns = sample.turns or ({"role": "user", "content": sample.prompt},)
        try:
            prompt = tokenizer.chat(turns)
        except RequestError as error:
            raise SortingError(f"calibration chat: {error.message}") from error
        tokens = [*prompt, *tokenizer.encode(sample.answer, add_special_tokens=False)]
        num_prompt = len(prompt)
    elif sample.prompt:
        context = f"Question: {sample.prompt}\nAnswer:" if sample.is_chat else sample.prompt
        prompt = tokenizer.encode(context)
        tokens = [*prompt, *tokenizer.encode(f" {sample.answer}", add_special_tokens=False)]
        num_prompt = len(prompt)
    else:
        tokens, num_prompt = tokenizer.encode(sample.answer), 1
    num_prompt = max(1, num_prompt)
    tokens = tokens[:window]
    return Text(tuple(tokens), num_prompt) if len(tokens) > num_prompt else None


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` or `.jsonl.gz` file. Raises SortingError with the line that is none."""
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SortingError(f"{path} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise SortingError(f"{path} line {number} is no object")
        rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise SortingError(f"{path} cannot be read as UTF-8 text ({error})") from error


def _read_file(path: Path, most_chars: int, most_pieces: int, seed: int) -> Iterator[Sample]:
    if ".jsonl" in path.name:
        for number, row in enumerate(read_rows(path), start=1):
            yield _sample(path, number, row)
        return
    content = _read_text(path)
    pieces = max(1, min(most_pieces, len(content) // most_chars))
    rng = random.Random(f"{seed} {path.name}")
    for piece in range(pieces):
        # a random place within the piece's share of the file, moved to the next paragraph
        share = len(content) // pieces
        start = piece * share + rng.randrange(max(1, share - most_chars + 1))
        paragraph = content.find("\n\n", start, start + most_chars // 2)
        start = paragraph + 2 if paragraph >= 0 and start > 0 else start
        yield Sample("", content[start : start + most_chars].strip())


def _sample(path: Path, number: int, row: dict[str, Any]) -> Sample:
    try:
        if "messages" in row:
            *turns, last = row["messages"]
            flat = "\n".join(str(turn["content"]) for turn in turns)
            return Sample(flat, str(last["content"]), is_chat=True, turns=tuple(turns))
        if "question" in row:
            return Sample(row["question"], _CALCULATOR.sub("", row["answer"]), is_chat=True)
        if "canonical_solution" in row:
            return Sample("", row["prompt"] + row["canonical_solution"])
        return Sample("", str(row["text"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SortingError(
            f"{path} line {number} is no sample ({error!r}); it needs `text`, `messages`, or `question` and `answer`"
        ) from error
