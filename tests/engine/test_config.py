"""Configurations of every supported family, as transformers 4 and 5 write them, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sortserve.engine.config import EngineConfig
from sortserve.engine.errors import ModelFolderError, StartupError
from sortserve.engine.model_config import ModelConfig, RopeConfig, load_model_config

# As Meta publishes it (transformers 4 style).
LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = {
    key: value for key, value in LLAMA_3_1.items() if key not in ("attention_bias", "mlp_bias", "rope_scaling")
} | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096, "eos_token_id": 2}
QWEN2 = MISTRAL | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "max_window_layers": 28,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "attention_bias": False}
FAMILIES = {"llama": LLAMA_3_1, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}


def load(folder: Path, raw: dict[str, Any], remove: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    value = {key: item for key, item in (raw | changes).items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(value))
    return load_model_config(folder)


def test_llama_of_transformers_4(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA_3_1)
    assert config.family == "llama"
    shape = config.shape
    assert (shape.num_layers, shape.hidden_size, shape.ffn_width, shape.vocab_size) == (32, 4096, 14336, 128256)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype_bytes) == (32, 8, 128, 2)
    assert config.rope == RopeConfig(500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert (config.rms_eps, config.dtype, config.max_position, config.max_context) == (1e-5, "bfloat16", 131072, 131072)
    assert not config.tie_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001, 128008, 128009))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_style_is_the_same(tmp_path: Path, family: str) -> None:
    raw = FAMILIES[family]
    rope = {"rope_theta": raw["rope_theta"], **raw.get("rope_scaling", {"rope_type": "default"})}
    old_keys = ("rope_theta", "rope_scaling", "torch_dtype")
    new = load(tmp_path, raw, remove=old_keys, rope_parameters=rope, dtype="bfloat16")
    assert new == load(tmp_path, raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_by_family(tmp_path: Path, family: str) -> None:
    plain = load(tmp_path, FAMILIES[family])
    biased = load(tmp_path, FAMILIES[family], attention_bias=True, mlp_bias=True)
    flags = ("attention_bias", "output_bias", "mlp_bias", "qk_norm")
    expected = {
        "llama": ((False, False, False, False), (True, True, True, False)),
        "mistral": ((False, False, False, False), (False, False, False, False)),
        "qwen2": ((True, False, False, False), (True, False, False, False)),
        "qwen3": ((False, False, False, True), (True, True, False, True)),
    }
    assert tuple(tuple(getattr(c, flag) for flag in flags) for c in (plain, biased)) == expected[family]


def test_what_is_not_said(tmp_path: Path) -> None:
    silent = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "torch_dtype", "eos_token_id")
    config = load(tmp_path, LLAMA_3_1, remove=(*silent, "rope_scaling", "bos_token_id"))
    assert config.shape.num_kv_heads == 32
    assert (config.rope, config.rms_eps, config.tie_embeddings) == (RopeConfig(), 1e-6, False)
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == ("float32", 1, (2,))
    assert load(tmp_path, QWEN2, remove=silent).eos_token_ids == ()
    assert load(tmp_path, QWEN3, remove=("head_dim",)).shape.head_dim == 128
    assert load(tmp_path, QWEN2 | {"head_dim": 64}).shape.head_dim == 64
    assert load(tmp_path, QWEN2, remove=("architectures",)).family == "qwen2"


def test_end_of_sequence_comes_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9, 7]}')
    assert load(tmp_path, QWEN2).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    assert load(tmp_path, QWEN2, eos_token_id=3).eos_token_ids == (3,)


def test_sliding_windows(tmp_path: Path) -> None:
    assert load(tmp_path, MISTRAL).sliding_window == 4096
    assert load(tmp_path, MISTRAL, sliding_window=None).sliding_window is None
    assert load(tmp_path, LLAMA_3_1, sliding_window=64).sliding_window is None
    assert load(tmp_path, QWEN2).sliding_window is None
    assert load(tmp_path, QWEN2, use_sliding_window=True, max_window_layers=32).sliding_window is None
    assert load(tmp_path, QWEN2, use_sliding_window=True, max_window_layers=0).sliding_window == 4096
    with pytest.raises(ModelFolderError, match=r"not for all layers.*28"):
        load(tmp_path, QWEN3, use_sliding_window=True, max_window_layers=28)
    with pytest.raises(ModelFolderError, match="not for all layers"):
        load(tmp_path, MISTRAL, layer_types=["full_attention", "sliding_attention"] * 16)


def test_rope_variants(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = load(tmp_path, QWEN2, rope_scaling=yarn, max_position_embeddings=32768)
    assert (config.rope.kind, config.rope.original_max_position, config.max_context) == ("yarn", 32768, 131072)
    unsaid = load(tmp_path, QWEN2, rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 32768})
    assert unsaid.rope.factor == 4.0
    dynamic = load(tmp_path, LLAMA_3_1, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=4096)
    assert (dynamic.rope.original_max_position, dynamic.max_context) == (4096, 8192)
    assert load(tmp_path, LLAMA_3_1, rope_scaling={"type": "linear", "factor": 2.0}).rope.factor == 2.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*LlamaForCausalLM, MistralForCausalLM"),
    "no-architecture": ({"architectures": None, "model_type": "t5"}, "missing.*t5"),
    "quantized": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized.*awq.*unquantized"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn, must be one of float32, bfloat16, float16"),
    "soft-cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "no-size": ({"hidden_size": None}, "hidden_size is None"),
    "text-size": ({"hidden_size": "4096"}, "hidden_size is '4096'"),
    "half-layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    "heads": ({"num_key_value_heads": 5}, "32 attention heads are not a multiple of 5"),
    "odd-head": ({"head_dim": 7}, "head_dim is 7, must be even"),
    "rope-kind": ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported.*yarn"),
    "rope-factor": ({"rope_scaling": {"type": "linear"}}, "factor is None"),
    "rope-nested": ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    "rope-partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "eos": ({"eos_token_id": "</s>"}, "must be token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ModelFolderError, match=message):
        load(tmp_path, LLAMA_3_1, **changes)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="does not exist"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        load_model_config(tmp_path)
    for broken in ('{"hidden_size": 4', "[1, 2]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ModelFolderError, match="download it again"):
            load_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFolderError, match="cannot be read"):
        load_model_config(tmp_path)


def test_engine_defaults_are_valid() -> None:
    assert EngineConfig(Path("/models/tiny")).model_name == "tiny"
    assert EngineConfig(Path("/models/tiny"), served_name="big").model_name == "big"
    assert dataclasses.replace(EngineConfig(Path("x")), device="cuda:1").device == "cuda:1"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "int8", "dtype is 'int8', must be one of auto"),
        ("kv_dtype", "int8", "kv_dtype is 'int8', must be one of auto, fp8"),
        ("device", "cuda:x", "device is 'cuda:x'"),
        ("max_model_len", 0, "max_model_len is 0, must be at least 1"),
        ("kv_bytes", -1, "kv_bytes is -1"),
        ("max_step_tokens", 0, "max_step_tokens is 0"),
        ("max_running", 0, "max_running is 0"),
        ("max_waiting", 0, "max_waiting is 0"),
        ("block_tokens", 4096, r"block_tokens is 4096, must be in \[1, 1024\]"),
        ("num_threads", 0, "num_threads is 0"),
        ("policy", "", "policy is empty"),
        ("fixed_submodel", "", "fixed_submodel is empty"),
    ],
)
def test_engine_settings_are_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        EngineConfig(Path("x"), **{field: value})
    assert caught.value.param == field
