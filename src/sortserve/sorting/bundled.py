"""Train the small provisional sorted model that ships with SortServe, and write its Hugging Face folder.

    python -m sortserve.sorting.bundled --books DIR --out src/sortserve/bundled [--minutes 20] [--seed 0]

Contract: reads the `*.md` books of DIR (public domain, one book a file); every 19th by name is held out and is seen
by neither the tokenizer nor the training, and books that share text with a held-out one are left out as well.
Writes config, weights (bfloat16), tokenizer, generation config, ladder.json and a model card to OUT: at most 8 MB.
The run picks its number of steps from the measured speed, so that all of it ends within --minutes; the number is
printed and written to the card, and `--steps N` repeats that schedule whatever the machine's speed. A machine that
slows down by more than a tenth gets a schedule that follows the clock; the card says when that happened.

Recipe: `soft_loss` (Sorted LLaMA / SoFT over depth, SortedNet arXiv 2309.00255 over width), from scratch.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sortserve.sorting.bundled_report import Run, write_report, write_tokenizer
from sortserve.sorting.soft_loss import EXITS, WIDTHS, Width, draw_width, exit_losses, make_sorted

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 128, 8, 4, 2, 32
BLOCK = 1024  # one training block: four windows of 256 tokens, or one of 1024
WINDOW = 256
BLOCKS_PER_STEP = 2
LONG_EVERY = 8  # every 8th step reads whole blocks, so that positions past 256 are trained as well
PEAK_LR, WARMUP = 3e-3, 0.04
HOLD_OUT_EVERY = 19
TOKENIZER_BYTES = 12_000_000
CALIBRATION_CYCLES = 4


@dataclass(frozen=True)
class Books:
    """File name -> text, split by book."""

    train: dict[str, str]
    held_out: dict[str, str]


def keep_freed_memory() -> None:
    """Have glibc reuse freed buffers: returning them to the kernel after each op costs a quarter of the CPU time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mmap for large buffers
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # another libc: only slower


def _long_paragraphs(text: str) -> set[str]:
    return {re.sub(r"\W+", " ", p).strip().lower() for p in text.split("\n\n") if len(p) >= 120}


def read_books(folder: Path) -> Books:
    """Split by name; drop from training what repeats a held-out book (a story that is in a collection too)."""
    paths = sorted(folder.glob("*.md"))
    if len(paths) < HOLD_OUT_EVERY:
        raise SystemExit(f"{folder}: {len(paths)} books, at least {HOLD_OUT_EVERY} needed")
    texts = {p.name: re.split(r"\n-{5,}\n", p.read_text(encoding="utf-8"), maxsplit=1)[-1].strip() for p in paths}
    held_out = {p.name: texts.pop(p.name) for p in paths[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]}
    known = set().union(*(_long_paragraphs(t) for t in held_out.values()))
    for name, text in list(texts.items()):
        shared = len(known & _long_paragraphs(text))
        if shared >= 3:
            print(f"left out of training: {name} shares {shared} paragraphs with held-out books", flush=True)
            del texts[name]
    return Books(train=texts, held_out=held_out)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE: the alphabet holds all 256 bytes, so no input is ever unknown."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(_up_to(texts, TOKENIZER_BYTES), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return tok


def _up_to(texts: Sequence[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text)
        yield text


def encode_blocks(tok: Tokenizer, texts: Sequence[str], tokens: int) -> Tensor:
    """Packed blocks of BLOCK tokens from as many books as `tokens` needs (encoding the rest would be waste)."""
    eos = tok.token_to_id(EOS)
    ids: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    have = 0
    for start in range(0, len(texts), 4):
        for enc in tok.encode_batch(list(texts[start : start + 4]), add_special_tokens=False):
            ids.append(np.asarray([*enc.ids, eos], dtype=np.int32))
            have += len(enc.ids) + 1
        if have >= tokens:
            break
    flat = np.concatenate(ids)
    return torch.from_numpy(flat[: len(flat) // BLOCK * BLOCK].reshape(-1, BLOCK).astype(np.int64))


def new_model(bos: int, eos: int, seed: int) -> Any:
    torch.manual_seed(seed)
    make_config: Any = LlamaConfig  # its signature leaves out the options of its base class
    config = make_config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTHS[0],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=BLOCK,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def new_optimizer(model: Any) -> torch.optim.AdamW:
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def lr_at(progress: float) -> float:
    """Linear warm-up, then cosine down to a fiftieth of the peak."""
    if progress < WARMUP:
        return PEAK_LR * (progress + 1e-3) / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))
    return PEAK_LR * (0.02 + 0.98 * cosine)


def one_step(model: Any, opt: torch.optim.AdamW, blocks: Tensor, step: int, bos: int) -> Tensor:
    """One update; returns the exits' mean losses. The FFN width must have been set."""
    windows = blocks if step % LONG_EVERY == LONG_EVERY - 1 else blocks.reshape(-1, WINDOW)
    # bfloat16 autocast: measured 1.7 times the speed of float32 on a CPU with AVX512-BF16.
    with torch.autocast("cpu", torch.bfloat16):
        losses = exit_losses(model, windows, bos).flatten(1).mean(1)
    opt.zero_grad(set_to_none=True)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    return losses.detach()


def measure_step_seconds(seed: int) -> float:
    """Seconds per step on random tokens with a throw-away model: the best cycle, as other work only ever adds time."""
    model = new_model(0, 1, seed)
    width, opt = make_sorted(model), new_optimizer(model)
    blocks = torch.randint(2, VOCAB, (BLOCKS_PER_STEP, BLOCK))
    one_step(model, opt, blocks, 0, 0)  # warms the allocator
    cycles = []
    for _ in range(CALIBRATION_CYCLES):
        start = time.monotonic()
        for step in range(LONG_EVERY):
            width.value = WIDTHS[0] if step % 2 else WIDTHS[1 + step // 2 % 2]
            one_step(model, opt, blocks, step, 0)
        cycles.append((time.monotonic() - start) / LONG_EVERY)
    return min(cycles)


def train(model: Any, width: Width, blocks: Tensor, steps: int, seed: int, deadline: float | None) -> tuple[int, bool]:
    """Train; returns (steps done, schedule hurried). A machine that slows down gets its cosine shortened to the
    deadline: the run still ends annealed, but is then no longer repeatable by step count, and the card says so."""
    opt, rng, bos = new_optimizer(model), random.Random(seed), int(model.config.bos_token_id)
    shuffle = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    begin, hurried = time.monotonic(), False
    for step in range(steps):
        progress, elapsed = step / steps, time.monotonic() - begin
        if deadline is not None and progress > 0.2 and elapsed / (deadline - begin) > progress:
            progress, hurried = elapsed / (deadline - begin), True
        if progress >= 1.0:
            return step, hurried
        for group in opt.param_groups:
            group["lr"] = lr_at(progress)
        if len(queue) < BLOCKS_PER_STEP:
            queue = torch.randperm(len(blocks), generator=shuffle).tolist()
        batch = blocks[[queue.pop() for _ in range(BLOCKS_PER_STEP)]]
        width.value = draw_width(rng)
        losses = one_step(model, opt, batch, step, bos)
        if step % 50 == 0 or step == steps - 1:
            exits = " ".join(f"d{d} {v:.3f}" for d, v in zip(EXITS, losses.tolist(), strict=True))
            speed = (step + 1) * BLOCKS_PER_STEP * BLOCK / (time.monotonic() - begin)
            print(f"step {step}/{steps} {elapsed:.0f}s w{width.value} {exits} | {speed:.0f} tokens/s", flush=True)
    return steps, hurried


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description="Train and write the bundled sorted model.")
    parser.add_argument("--books", type=Path, required=True, help="folder of *.md books")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time for the whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="exact number of steps, in place of --minutes")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="held-out tokens measured per book")
    args = parser.parse_args()
    keep_freed_memory()
    books = read_books(args.books)
    names = sorted(books.train)
    random.Random(args.seed).shuffle(names)
    texts = [books.train[n] for n in names]
    tok = train_tokenizer(texts)
    ids = tok.get_vocab()
    print(f"tokenizer ready, {time.monotonic() - begin:.0f}s", flush=True)
    steps, deadline = args.steps, None
    if steps is None:
        reserve = min(60.0, 15 * args.minutes)  # encoding, measuring, writing
        deadline = begin + args.minutes * 60 - reserve
        # Below the measured speed, so that a small disturbance does not touch the schedule.
        steps = max(LONG_EVERY, int(0.9 * (deadline - time.monotonic()) / measure_step_seconds(args.seed)))
    blocks = encode_blocks(tok, texts, steps * BLOCKS_PER_STEP * BLOCK)
    print(f"{steps} steps, {blocks.numel()} tokens encoded, {time.monotonic() - begin:.0f}s", flush=True)
    model = new_model(ids[BOS], ids[EOS], args.seed)
    start = time.monotonic()
    done, hurried = train(model, make_sorted(model), blocks, steps, args.seed, deadline)
    seconds = time.monotonic() - start
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
    write_tokenizer(tok, args.out, BOS, EOS, BLOCK)
    run = Run(done, not hurried, done * BLOCKS_PER_STEP * BLOCK, blocks.numel(), seconds, args.minutes, args.seed)
    write_report(args.out, tok, books.held_out, run, args.eval_tokens, WINDOW)
    print(f"done in {(time.monotonic() - begin) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
