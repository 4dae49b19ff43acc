"""Tiny random checkpoints, written by transformers itself, so that greedy output varies.

Names, shapes, configuration and reference logits are thus transformers' own and not ours. Writing one takes about 50
ms, importing transformers' models the first time about 7 s.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

# `rope_parameters` of every kind that is supported, for max_position_embeddings 256.
ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
    },
}


def make_tiny(folder: Path, family: str, seed: int = 0, *, shards: int = 1, **overrides: Any) -> PreTrainedModel:
    """Write a tiny float32 checkpoint into `folder` and return the model, in eval mode, as the reference.

    6 layers, hidden 48, 6 query and 2 key/value heads of 8, FFN 64, 101 tokens, untied, no end-of-sequence token.
    `shards` over 1 makes that many files or a few more. `overrides` are fields of the transformers configuration, e.g.
    `rope_parameters=ROPE_VARIANTS["yarn"]`, `head_dim=16`, `tie_word_embeddings=True`, `sliding_window=8`.
    """
    config_class, model_class = _CLASSES[family]
    settings: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": dict(ROPE_VARIANTS["default"]),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
    }
    settings |= {"head_dim": 8} if family == "qwen3" else {}
    settings |= {"sliding_window": None} if family == "mistral" else {}
    model = model_class(config_class(**settings | overrides)).float().eval()
    randomize(model, seed)
    max_shard_bytes = "5GB" if shards == 1 else sum(p.nbytes for p in model.parameters()) // (shards - 1)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    reference: PreTrainedModel = model
    return reference


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Seeded weights: norms near 1, biases far from 0, matrices wide enough that logits differ by several units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1 or "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(2.0 * parameter.shape[1] ** -0.5 * noise)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Set and remove top-level keys of a JSON file."""
    value = json.loads(path.read_text())
    for key in remove:
        del value[key]
    path.write_text(json.dumps(value | changes))
