"""The model card of a model made from nothing."""

from typing import Any

from sortserve.sorting.data import Texts
from sortserve.sorting.trainer import Parts


def card(parts: Parts, texts: Texts, record: dict[str, Any]) -> str:
    """README.md in Markdown with the head that model hubs read; every number is the record's or the recipe's."""
    config, recipe, sampler = parts.model.config, parts.recipe, parts.sampler
    rows = [
        f"| {name} | {loss['nats']:.3f} | {loss['bits_per_byte']:.3f} |"
        for name, loss in record["held_out"].get("losses", {}).items()
    ]
    held_out = "\n".join(f"- {name.removesuffix('.md')}" for name in texts.held_out)
    values = {
        "kind": "alone (no sub-models)" if recipe.alone else "sorted",
        "exits": ", ".join(map(str, sampler.exits)),
        "widths": ", ".join(map(str, sampler.widths)),
        "params": f"{sum(p.numel() for p in parts.model.parameters()) / 1e6:.2f}",
        "hours": f"{record['seconds'] / 3600:.1f}",
        "threads": str(record["machine"]["threads"]),
        "device": record["machine"]["device"],
        "tokens": f"{record['tokens'] / 1e6:.1f}",
        "epochs": f"{record['tokens'] / record['training_tokens']:.1f}",
        "layers": str(config.num_hidden_layers),
        "hidden": str(config.hidden_size),
        "heads": str(config.num_attention_heads),
        "kv": str(config.num_key_value_heads),
        "dim": str(config.head_dim),
        "ffn": str(config.intermediate_size),
        "vocab": f"{config.vocab_size:,}",
        "updates": f"{record['updates']:,}",
        "speed": f"{record['tokens_s']:.0f}",
        "share": f"{record['share_of_machine_flops']:.0%}",
        "command": record["command"],
        "measured": f"{record['held_out'].get('tokens', 0):,}",
        "window": str(recipe.train.window),
        "rows": "\n".join(rows),
        "held_out": held_out,
    }
    text = CARD
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small @kind@ Llama

One set of weights in which every exit (@exits@ layers) and every FFN prefix (@widths@ neurons) is a model of its own.
@params@ M parameters, trained from scratch for @hours@ hours (@device@, @threads@ threads). It writes book-like English,
knows few facts and follows no instructions; the chat template only makes chat requests possible.

## Data and licence

Books in the public domain, one file each, without their title headers. The files below are held out, and files that repeat
a held-out one are left out. @tokens@ M tokens were trained on, @epochs@ times the text, of a byte-level BPE of @vocab@
tokens that was trained on the same files. The model repeats the views and the language of its period.

## Recipe

`LlamaForCausalLM`, @layers@ layers, hidden @hidden@, @heads@ query heads and @kv@ key/value heads of @dim@, FFN @ffn@, tied
head. `recipe.toml` says the rest. @updates@ updates at @speed@ tokens/s, @share@ of the machine's FLOP rate.

    @command@

## Held-out numbers

@measured@ tokens, the openings of the held-out files in windows of @window@, with the shipped bfloat16 weights computed in
float32. What is served, and how good it is, says `ladder.json`.

| sub-model | nats/token | bits/byte |
| --- | --- | --- |
@rows@

## Held-out files

@held_out@
"""
