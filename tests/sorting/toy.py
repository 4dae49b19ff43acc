"""Toy models and text for the tests of training: small enough that a step takes milliseconds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

LAYERS, HIDDEN, WIDTH, VOCAB = 4, 32, 48, 97
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def toy_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Random weights; norms and biases random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    make: Any = AutoModelForCausalLM.from_config
    model = make(FAMILIES[family](**{**shape, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def toy_tokens(windows: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """[windows, length]."""
    return torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


RECIPE = """\
[model]
layers = 4
hidden = 32
ffn_width = 64
heads = 2
kv_heads = 1
head_dim = 16
vocab = 300
context = 64
[data]
hold_out_every = 4
[grid]
exits = [2]
widths = [32]
[method]
passes = 2
distill = 0.25
[train]
tokens_per_pass = 128
window = 32
long_every = 3
long_window = 64
lr = 0.01
log_every = 1
"""


def write_books(folder: Path, count: int = 5) -> Path:
    """Files of made-up sentences, each with words of its own."""
    folder.mkdir()
    for number in range(count):
        lines = [f"The {word}{number} of book {number} saw {word} again and went home." for word in WORDS]
        (folder / f"book{number}.md").write_text("\n\n".join(lines * 4))
    return folder


WORDS = ("king", "river", "horse", "letter", "window", "garden", "captain", "morning", "stranger", "bridge")
