"""Measure the bundled model on held-out books and write its ladder, tokenizer files and model card.

Contract: everything is read back from the written folder, so the numbers are those of the bfloat16 weights that ship.
Quality of a sub-model = exp(loss_full - loss): the ratio of its geometric-mean token probability to the full model's.
Intervals: 95 % percentile bootstrap over held-out books (tokens of one book are not independent of each other).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from sortserve.sorting.soft_loss import EXITS, WIDTHS, exit_losses, make_sorted

Array = npt.NDArray[np.float64]
Point = tuple[int, int]  # (depth, width)
PROMPT = "Once upon a time"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Run:
    """What the training did, for the card."""

    steps: int
    repeatable: bool
    tokens: int
    encoded: int
    seconds: float
    minutes: float
    seed: int

    @property
    def command(self) -> str:
        how = f"--steps {self.steps}" if self.repeatable else f"--minutes {self.minutes:g}"
        return f"python -m sortserve.sorting.bundled --books DIR --out src/sortserve/bundled {how} --seed {self.seed}"


@dataclass(frozen=True)
class Measured:
    """Per held-out book: summed losses by grid point, tokens and UTF-8 bytes."""

    losses: dict[Point, Array]
    tokens: Array
    text_bytes: Array

    def loss(self, point: Point) -> float:
        return float(self.losses[point].sum() / self.tokens.sum())

    def bits_per_byte(self, point: Point) -> float:
        return float(self.losses[point].sum() / math.log(2) / self.text_bytes.sum())

    def quality(self, point: Point, full: Point) -> tuple[float, float, float]:
        """(value, low, high); books are drawn in pairs with the full model's loss on the same books."""
        gap = self.losses[full] - self.losses[point]
        draws = np.random.default_rng(0).integers(0, len(gap), (4000, len(gap)))
        boot = np.exp(gap[draws].sum(1) / self.tokens[draws].sum(1))
        low, high = np.quantile(boot, [0.025, 0.975])
        return float(np.exp(gap.sum() / self.tokens.sum())), float(low), float(high)


def write_tokenizer(tok: Tokenizer, out: Path, bos: str, eos: str, max_length: int) -> None:
    tok.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", config)


def measure(model: Any, tok: Tokenizer, books: Mapping[str, str], per_book: int, window: int) -> Measured:
    """Losses over the opening `per_book` tokens of each book, in windows that BOS opens."""
    width, bos = make_sorted(model), int(model.config.bos_token_id)
    # In a byte-level vocabulary every character of a token's spelling stands for one byte.
    byte_len = np.array([len(tok.id_to_token(i) or "") for i in range(tok.get_vocab_size())])
    losses: dict[Point, list[float]] = {(d, w): [] for d in EXITS for w in WIDTHS}
    tokens, text_bytes = [], []
    for text in books.values():
        ids = tok.encode(text[: 8 * per_book], add_special_tokens=False).ids[:per_book]
        ids = ids[: len(ids) // window * window]
        windows = torch.tensor(ids).reshape(-1, window)
        tokens.append(len(ids))
        text_bytes.append(int(byte_len[ids].sum()))
        for width.value in WIDTHS:
            with torch.inference_mode():
                parts = [exit_losses(model, part, bos).double().sum((1, 2)) for part in torch.split(windows, 16)]
            for depth, value in zip(EXITS, torch.stack(parts).sum(0).tolist(), strict=True):
                losses[depth, width.value].append(value)
    width.value = WIDTHS[0]
    return Measured({k: np.array(v) for k, v in losses.items()}, np.array(tokens, float), np.array(text_bytes, float))


def weight_bytes(config: Any, point: Point) -> int:
    """Bytes of bfloat16 weights read to produce one token: layers, final norm and head (the embedding is one row)."""
    depth, width = point
    hidden, dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * width + 2 * hidden
    return 2 * int(depth * layer + hidden + hidden * config.vocab_size)


def choose_rungs(cost: Mapping[Point, int], value: Mapping[Point, float]) -> list[Point]:
    """The undominated grid points, cheapest first, plus the best point of any exit or width they leave out."""
    order = sorted(cost, key=lambda p: (cost[p], -value[p]))
    kept: list[Point] = []
    for point in order:
        if not kept or value[point] > max(value[k] for k in kept):
            kept.append(point)
    for axis, needed in ((0, EXITS), (1, WIDTHS)):
        missing = set(needed) - {p[axis] for p in kept}
        kept += [max((p for p in order if p[axis] == at), key=lambda p: value[p]) for at in missing]
    return sorted(kept, key=lambda p: cost[p])


def ladder(config: Any, m: Measured, run: Run, books: int, full: Point) -> dict[str, Any]:
    quality = {p: m.quality(p, full) for p in m.losses}
    rungs = choose_rungs({p: weight_bytes(config, p) for p in quality}, {p: q[0] for p, q in quality.items()})
    entries: list[dict[str, Any]] = []
    for point in rungs:
        value, low, high = (round(v, 4) for v in quality[point])
        entry: dict[str, Any] = {"depth": point[0], "width": point[1]}
        entry["quality"] = {"value": value, "low": low, "high": high}
        if value < 0.5:
            entry["degraded"] = True
        entries.append(entry)
    return {
        "format": "sortserve-ladder",
        "version": 1,
        "num_layers": config.num_hidden_layers,
        "ffn_width": config.intermediate_size,
        "measured": {
            "metric": "exp(loss_full - loss)",
            "data": f"openings of {books} held-out public-domain books; 95% bootstrap interval over books",
            "command": run.command,
            "tokens": int(m.tokens.sum()),
        },
        "entries": entries,
    }


def sample(model: Any, tok: Tokenizer, depth: int) -> str:
    """Greedy continuation of PROMPT at an exit: transformers itself runs only config.num_hidden_layers layers."""
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers = depth
    try:
        ids = torch.tensor([tok.encode(PROMPT).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    finally:
        model.config.num_hidden_layers = layers
    return tok.decode(out[0].tolist())


def card(model: Any, tok: Tokenizer, m: Measured, run: Run, books: Mapping[str, str], rungs: list[Point]) -> str:
    full = (EXITS[-1], WIDTHS[0])
    rows = []
    for p in sorted(m.losses, key=lambda p: (-p[0], -p[1])):
        value, low, high = m.quality(p, full)
        cells = [str(p[0]), str(p[1]), f"{weight_bytes(model.config, p) / 1e6:.2f}", f"{m.loss(p):.3f}"]
        cells += [f"{m.bits_per_byte(p):.3f}", f"{value:.3f} [{low:.3f}, {high:.3f}]", "yes" if p in rungs else "no"]
        rows.append("| " + " | ".join(cells) + " |")
    samples = "\n\n".join(f"depth {d}:\n\n```text\n{sample(model, tok, d)}\n```" for d in (8, 4, 2))
    names = "\n".join(f"- {n.removesuffix('.md')}" for n in books)
    values = {
        "params": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        "trained": f"{run.tokens / 1e6:.1f}",
        "encoded": f"{min(run.tokens, run.encoded) / 1e6:.1f}",
        "steps": str(run.steps),
        "speed": f"{run.tokens / run.seconds:.0f}",
        "training_minutes": f"{run.seconds / 60:.1f}",
        "command": run.command,
        "repeat": "" if run.repeatable else "(Other work slowed the machine: the schedule followed the clock.)",
        "tokens": f"{int(m.tokens.sum()):,}",
        "rows": "\n".join(rows),
        "samples": samples,
        "names": names,
    }
    text = CARD
    for key, value_text in values.items():
        text = text.replace("@" + key + "@", value_text)
    return text


def write_report(out: Path, tok: Tokenizer, books: Mapping[str, str], run: Run, per_book: int, window: int) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.eval()
    m = measure(model, tok, books, per_book, window)
    full = (EXITS[-1], WIDTHS[0])
    rungs = ladder(model.config, m, run, len(books), full)
    _write_json(out / "ladder.json", rungs)
    kept = [(e["depth"], e["width"]) for e in rungs["entries"]]
    (out / "README.md").write_text(card(model, tok, m, run, books, kept), encoding="utf-8")
    for p in sorted(m.losses):
        print(f"held out d{p[0]} w{p[1]}: {m.loss(p):.4f} nats/token, {m.bits_per_byte(p):.4f} bits/byte", flush=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# SortServe bundled model (provisional)

A very small *sorted* Llama: one set of weights in which every exit (2, 4, 6 or 8 layers) and every FFN prefix
(512, 256 or 128 neurons) is a model of its own. It lets SortServe start, be tested and be shown without a download.
It is **provisional**: @params@ M parameters trained for @training_minutes@ minutes on two CPU cores. It writes
book-like English with little sense, knows no facts and follows no instructions; the chat template only makes
chat requests possible. Do not use it for anything but trying the server.

## Data and licence

English public-domain books (children's books and prose up to the early 20th century), one Markdown file each, without
their title headers. Every 19th book by name is held out, and books that repeat a held-out one are left out.
The text is in the public domain. Trained on @trained@ M tokens (@encoded@ M distinct) of a byte-level BPE of
2,048 tokens trained on the same books. The model repeats the views and the language of its period.

## Recipe

`LlamaForCausalLM`, 8 layers, hidden 128, 4 query heads and 2 key/value heads of 32, FFN 512, tied head, trained from
scratch. Each step: mean of the four exits' cross-entropies under the shared final norm and head (Sorted LLaMA / SoFT),
at the full FFN width half of the time, else at a narrower prefix (SortedNet, arXiv 2309.00255). AdamW, peak rate
3e-3, warm-up and cosine, weight decay 0.1, clip 1.0, bfloat16 autocast, 2,048 tokens a step: windows of 256, every
8th step windows of 1,024, each opened by BOS. @steps@ steps at @speed@ tokens/s.

    @command@

@repeat@

## Held-out numbers

@tokens@ tokens: openings of the held-out books, in windows of 256, with the shipped bfloat16 weights computed in
float32. Quality is exp(loss_full - loss) with a 95 % bootstrap interval over books; MB is bfloat16 weights
read per token. Rows marked yes are in `ladder.json`; the others are dominated (no cheaper and no better).

| depth | width | MB/token | nats/token | bits/byte | quality [95 %] | in ladder |
| --- | --- | --- | --- | --- | --- | --- |
@rows@

## Samples (greedy, full width)

@samples@

## Held-out books

@names@
"""
