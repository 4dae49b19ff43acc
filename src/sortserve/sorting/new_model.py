"""A Llama made from nothing, by a recipe: its tokenizer, its first weights, and the files that go with them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from sortserve.sorting import data
from sortserve.sorting.recipe import Recipe

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(texts: data.Texts, recipe: Recipe, folder: Path) -> Tokenizer:
    """Trained on the training text; kept in `folder`, so that a run that goes on has the same one at once."""
    assert recipe.model is not None
    path = folder / f"tokenizer-{texts.digest[:12]}-{recipe.model.vocab}-{recipe.seed}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    made = data.train_tokenizer(texts, recipe.model.vocab, recipe.data.tokenizer_bytes, recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / ".writing.json"
    writing.write_text(made.to_str(), encoding="utf-8")  # its own `save` makes a full disk a bare Exception
    writing.rename(path)
    return made


def make(recipe: Recipe, tokenizer: Tokenizer) -> Any:
    """Float32, initialised from torch's generator. The projections back to the residual stream start smaller by
    sqrt(2 * layers), so that the stream's size does not grow with depth (GPT-2)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = recipe.model
    assert shape is not None
    make_config: Any = LlamaConfig  # its signature leaves out the options of its base class
    config = make_config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(data.BOS),
        eos_token_id=tokenizer.token_to_id(data.EOS),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * shape.layers))
    return model


def write_tokenizer(made: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json and its config, with a chat template so that chat requests are possible."""
    (folder / "tokenizer.json").write_text(made.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": data.BOS,
        "eos_token": data.EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
