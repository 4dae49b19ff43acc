"""Frequencies and tables against transformers, for every kind of stretching."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sortserve.engine.model_config import RopeConfig, load_model_config
from sortserve.engine.rope import inverse_frequencies, rope_table
from tests.engine.tiny_models import ROPE_VARIANTS

LLAMA_3_1 = ROPE_VARIANTS["llama3"] | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {  # rope_parameters, head_dim, max_position_embeddings
    **{name: (parameters, 8, 256) for name, parameters in ROPE_VARIANTS.items()},
    "llama3.1": (LLAMA_3_1, 128, 131072),
    "qwen2.5-yarn": (
        ROPE_VARIANTS["yarn"] | {"original_max_position_embeddings": 32768, "beta_fast": 32.0},
        128,
        131072,
    ),
    "yarn-factor": (ROPE_VARIANTS["yarn"] | {"attention_factor": 1.25, "truncate": False}, 64, 256),
    "yarn-mscale": (ROPE_VARIANTS["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.5}, 64, 256),
}


def both(folder: Path, case: str) -> tuple[LlamaConfig, RopeConfig, int]:
    parameters, head_dim, max_position = VARIANTS[case]
    theirs = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rope_parameters=dict(parameters),
        architectures=["LlamaForCausalLM"],
    )
    theirs.save_pretrained(folder)
    return theirs, load_model_config(folder).rope, head_dim


@pytest.mark.parametrize("case", VARIANTS)
def test_frequencies_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs, ours, head_dim = both(tmp_path, case)
    default: Any = LlamaRotaryEmbedding.compute_default_rope_parameters
    expected, expected_factor = ROPE_INIT_FUNCTIONS.get(ours.kind, default)(theirs)
    frequencies, factor = inverse_frequencies(ours, head_dim, theirs.max_position_embeddings)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, expected)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("case", ROPE_VARIANTS)
def test_tables_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs, ours, head_dim = both(tmp_path, case)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(256)[None])  # [1, 256, head_dim], two halves
    our_cos, our_sin = rope_table(ours, head_dim, 256)
    assert torch.equal(our_cos, cos[0, :, : head_dim // 2])
    assert torch.equal(our_sin, sin[0, :, head_dim // 2 :])


def test_dynamic_beyond_the_original_context(tmp_path: Path) -> None:
    """A sequence of exactly the longest length sees what transformers would use for it in one forward pass."""
    theirs, ours, head_dim = both(tmp_path, "dynamic")
    cos, _ = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(400)[None])
    torch.testing.assert_close(rope_table(ours, head_dim, 400)[0], cos[0, :, : head_dim // 2], rtol=0, atol=2e-5)
    assert not torch.equal(rope_table(ours, head_dim, 400)[0][:256], rope_table(ours, head_dim, 256)[0])
    assert torch.equal(rope_table(ours, head_dim, 100)[0], rope_table(ours, head_dim, 256)[0][:100])


def test_variants_differ_from_the_plain_one() -> None:
    """The comparison above could not fail if the tiny variants did not stretch anything."""
    plain = RopeConfig()
    for rope in (
        RopeConfig(kind="linear", factor=4.0),
        RopeConfig(kind="llama3", factor=8.0, original_max_position=64),
        RopeConfig(kind="yarn", factor=4.0, original_max_position=64),
    ):
        assert not torch.equal(inverse_frequencies(rope, 8, 256)[0], inverse_frequencies(plain, 8, 256)[0])
