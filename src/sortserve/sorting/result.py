"""What a finished run leaves in its folder, and what it says of itself.

Contract: everything is written to OUT/.writing and moved into place at the end, file by file, weights last but for the
record; a full disk leaves what was there, and the unfinished run, which is removed only when all is in place.
"""

import json
import platform
import resource
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.sorting import held_out, lora, memory, new_model
from sortserve.sorting.data import Texts
from sortserve.sorting.flops import machine_flops, model_shape, pass_flops
from sortserve.sorting.optimizer import Optimizer
from sortserve.sorting.recipe import write_recipe
from sortserve.sorting.trainer import Parts, Progress

SOURCE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
PER_FILE = 8192  # held-out tokens of each file


def opening(parts: Parts, texts: Texts) -> str:
    """What is about to happen, in lines for a person."""
    sampler, train = parts.sampler, parts.recipe.train
    trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in parts.model.parameters())
    most = memory.bound(parts.model, parts.sampler, parts.recipe)
    return "\n".join(
        [
            f"{len(texts.train)} files to train on, {len(texts.held_out)} held out, {len(texts.left_out)} left out; "
            f"{len(parts.packed.tokens):,} tokens",
            f"{everything / 1e6:.2f} M weights, {trained / 1e6:.2f} M trained; exits {list(sampler.exits)}, "
            f"widths {list(sampler.widths)}",
            f"a step takes at most {most / 2**30:.2f} GiB beside the weights ({train.tokens_per_pass} tokens a pass)",
        ]
    )


def write(
    parts: Parts,
    texts: Texts,
    tokenizer: Tokenizer,
    progress: Progress,
    optimizer: Optimizer,
    source: Path | None,
    command: str,
) -> None:
    """Merge, measure, write, and remove the unfinished run. Raises SortingError if the disk is full."""
    model, recipe = parts.model, parts.recipe
    shares = _speed(parts, progress)
    writing = parts.out / ".writing"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        if parts.ranks is not None and recipe.lora is not None:
            lora.save_adapters(model, recipe.lora, writing / "adapter")
            lora.merge(model, parts.ranks, recipe.lora.merge_rank)
        model.to(torch.bfloat16)
        model.config._attn_implementation = None
        model.save_pretrained(writing)
        if source is None:
            new_model.write_tokenizer(tokenizer, writing, model.config.max_position_embeddings)
        for name in SOURCE_FILES:
            if source is not None and (source / name).exists():
                shutil.copyfile(source / name, writing / name)
        shutil.copyfile(parts.log, writing / "training.jsonl")
        (writing / "recipe.toml").write_text(write_recipe(recipe), encoding="utf-8")
        shape = load_model_config(writing).shape
        _ladder(parts, shape).dump(writing / "ladder.json")
        model.to(torch.float32)  # bfloat16 weights, as they are served, computed with in float32
        found = held_out.measure(
            model,
            tokenizer,
            texts,
            parts.bos,
            parts.sampler.exits,
            parts.sampler.widths,
            window=recipe.train.window,
            per_file=PER_FILE,
        )
        record = _record(parts, texts, progress, command) | shares
        record["held_out"] |= _measured(found)
        (writing / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if source is None:
            from sortserve.sorting.card import card

            (writing / "README.md").write_text(card(parts, texts, record), encoding="utf-8")
        for path in sorted(writing.iterdir(), key=lambda p: (p.name == "training.json", p.suffix == ".safetensors")):
            for file in [path, *path.rglob("*")]:
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes files readable by their owner only
            if path.is_dir():
                shutil.rmtree(parts.out / path.name, ignore_errors=True)
            path.replace(parts.out / path.name)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a failed write
        raise SortingError(f"{parts.out}: {error}; the run is kept, the same command writes its result") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    shutil.rmtree(parts.unfinished, ignore_errors=True)
    print(table(record), file=sys.stderr)


def _ladder(parts: Parts, shape: ModelShape) -> Ladder:
    entries = []
    for depth, width in parts.sampler.grid:
        submodel = SubModel.make(depth, width)
        entries.append(Entry(submodel.name(shape) or f"d{depth}-n{width}", submodel))
    return Ladder.of(shape, entries)


def _speed(parts: Parts, progress: Progress) -> dict[str, Any]:
    """Tokens a second and the share of the machine's rate of operations, of the run's mean."""
    config, recipe = parts.model.config, parts.recipe
    shape = model_shape(config)
    rank, sample = (recipe.lora.rank if recipe.lora else 0), range(min(progress.update, 200))
    drawn = [one for update in sample for one in parts.sampler.passes_of(update)]
    each = [
        pass_flops(shape, one.chosen, 1, recipe.train.window, frozen=recipe.lora is not None, lora_rank=rank)
        for one in drawn
    ]
    speed = progress.tokens / max(1e-9, progress.seconds)
    used = speed * sum(each) / max(1, len(each))
    whole = machine_flops(getattr(torch, recipe.train.dtype), parts.accelerator.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_s": round(speed, 1),
        "flops_s": round(used),
        "share_of_machine_flops": round(used / whole, 3),
        "peak_memory_bytes": peak,
        "step_memory_bound_bytes": memory.bound(parts.model, parts.sampler, recipe),
    }


def _record(parts: Parts, texts: Texts, progress: Progress, command: str) -> dict[str, Any]:
    return {
        "command": f"sortserve {command}",
        "recipe": "recipe.toml",
        "updates": progress.update,
        "tokens": progress.tokens,
        "training_tokens": len(parts.packed.tokens),
        "seconds": round(progress.seconds, 1),
        "data": {"sha256": texts.digest, "files": len(texts.train), "left_out": list(texts.left_out)},
        "held_out": {"files": list(texts.held_out)},
        "versions": {
            name: version(name) for name in ("sortserve", "torch", "transformers", "accelerate", "tokenizers")
        },
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(parts.accelerator.device),
        },
    }


def _measured(found: held_out.HeldOut | None) -> dict[str, Any]:
    if found is None:
        return {}
    losses = {
        f"d{d}-w{w}": {"nats": round(found.nats[d, w], 4), "bits_per_byte": round(found.bits_per_byte((d, w)), 4)}
        for d, w in sorted(found.nats)
    }
    return {"tokens": found.tokens, "bytes": found.text_bytes, "losses": losses}


def table(record: dict[str, Any]) -> str:
    """The record's figures in a few lines."""
    lines = [
        f"{record['updates']} updates, {record['tokens']:,} tokens, {record['seconds']:.0f} s, {record['tokens_s']:.0f} "
        f"tokens/s, {record['share_of_machine_flops']:.0%} of the machine's FLOP rate, "
        f"peak memory {record['peak_memory_bytes'] / 2**30:.2f} GiB"
    ]
    for name, loss in record["held_out"].get("losses", {}).items():
        lines.append(f"held out {name:10} {loss['nats']:.4f} nats/token {loss['bits_per_byte']:.4f} bits/byte")
    return "\n".join(lines)
