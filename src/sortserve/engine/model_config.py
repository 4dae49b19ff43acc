"""A model's own configuration, read from its folder: sizes, family, rotation, special tokens. No torch here."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from sortserve.engine.errors import ModelFolderError
from sortserve.engine.submodel import ModelShape

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What transformers takes where config.json is silent.
_DEFAULT_KV_HEADS: Mapping[Family, int] = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_BOS_EOS: Mapping[Family, tuple[int, int]] = {"llama": (1, 2), "mistral": (1, 2)}
_DEFAULT_WINDOW = 4096
_DEFAULT_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that a kind does not use keep their default."""

    theta: float = 10_000.0  # base of the wavelengths
    kind: RopeKind = "default"
    factor: float = 1.0  # how many times the context is stretched; all kinds but default
    original_max_position: int = 0  # tokens of context before stretching; dynamic, llama3, yarn
    low_freq_factor: float = 1.0  # llama3: wavelengths over original_max_position / this are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths under original_max_position / this stay
    attention_factor: float | None = None  # yarn: scales cos and sin; None: from factor and the two mscales
    beta_fast: float = 32.0  # yarn: rotations over the context from which on a dimension stays as it is
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is divided by factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama kind: pre-norm with RMSNorm, rotary attention with grouped heads, SiLU-gated FFN."""

    family: Family
    shape: ModelShape  # dtype_bytes is that of the checkpoint
    rms_eps: float  # added to the mean square in every RMSNorm
    rope: RopeConfig
    attention_bias: bool  # q, k and v have biases
    output_bias: bool  # o has one
    mlp_bias: bool  # gate, up and down have biases
    qk_norm: bool  # RMSNorm over each head of q and of k before the rotation (Qwen3)
    tie_embeddings: bool  # the LM head is the embedding matrix
    max_position: int  # tokens, as config.json says; see max_context
    sliding_window: int | None  # a token attends to itself and the window - 1 before it; None: to all before it
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # may be empty
    dtype: str  # of the checkpoint by its config: float32, bfloat16 or float16
    activation: Literal["silu"] = "silu"

    @property
    def max_context(self) -> int:
        """Tokens of context that the model is configured for, stretched positions included.

        For yarn, config.json may hold the length before or after stretching; for dynamic it is the one before. For
        linear nobody agrees, so it is taken as it stands.
        """
        if self.rope.kind == "yarn":
            return max(self.max_position, math.floor(self.rope.original_max_position * self.rope.factor))
        if self.rope.kind == "dynamic":
            return math.floor(self.max_position * self.rope.factor)
        return self.max_position


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json (as transformers 4.x or 5.x writes it) and generation_config.json of a model folder.

    Raises ModelFolderError where the folder or the file is missing or broken, or the model is not supported.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"model folder {folder} does not exist; give the folder that holds config.json")
    raw = read_json(folder / "config.json")
    if raw is None:
        raise ModelFolderError(f"{folder} has no config.json; give a Hugging Face model folder, not one above or below")
    fields = _Fields(folder / "config.json", raw)
    family = _family(fields)
    _check_supported(fields)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise fields.error(f"dtype is {dtype}, must be one of {', '.join(DTYPE_BYTES)}")
    shape = _shape(fields, family, DTYPE_BYTES[dtype])
    max_position = fields.integer("max_position_embeddings")
    bos_token_id, eos_token_ids = _special_tokens(fields, family, read_json(folder / "generation_config.json") or {})
    attention_bias = family == "qwen2" or (family in ("llama", "qwen3") and bool(raw.get("attention_bias")))
    return ModelConfig(
        family=family,
        shape=shape,
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_position),
        attention_bias=attention_bias,
        output_bias=attention_bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
        qk_norm=family == "qwen3",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position=max_position,
        sliding_window=_sliding_window(fields, family, shape.num_layers),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        dtype=dtype,
    )


class _Fields:
    """config.json, or an object inside it, with errors that name the file and the key."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw

    def error(self, message: str) -> ModelFolderError:
        return ModelFolderError(f"{self.path}: {message}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise self.error(f"{key} is {value!r}, must be a number above 0")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise self.error(f"{key} is {value}, must be a whole number")
        return int(value)

    def optional(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} holds a {type(value).__name__}, must be an object; download it again")
    return value


def _family(fields: _Fields) -> Family:
    architectures = fields.raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name is None and fields.raw.get("model_type") in get_args(Family):  # a config.json saved without a model class
        return cast(Family, fields.raw["model_type"])
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        shown = name or f"missing (model_type {fields.raw.get('model_type')!r})"
        raise fields.error(f"architecture {shown} is not supported; supported are {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[name]


def _check_supported(fields: _Fields) -> None:
    for key in ("quantization_config", "compression_config"):
        if fields.raw.get(key):
            method = fields.raw[key].get("quant_method", "unnamed") if isinstance(fields.raw[key], dict) else "unnamed"
            raise fields.error(
                f"the checkpoint is quantized ({key}, method {method}), which is not supported; "
                "use the unquantized one in float32, bfloat16 or float16"
            )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.raw.get(key):
            raise fields.error(f"{key} is {fields.raw[key]}, and capped logits (Gemma's) are not supported")
    activation = fields.raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.error(f"hidden_act is {activation!r}, only silu is supported")


def _shape(fields: _Fields, family: Family, dtype_bytes: int) -> ModelShape:
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    # `null` means as many as query heads; silence means the family's default
    silent = num_heads if "num_key_value_heads" in fields.raw else _DEFAULT_KV_HEADS.get(family, num_heads)
    num_kv_heads = fields.integer("num_key_value_heads", silent)
    if num_heads % num_kv_heads:
        raise fields.error(f"{num_heads} attention heads are not a multiple of {num_kv_heads} key/value heads")
    silent = _DEFAULT_QWEN3_HEAD_DIM if family == "qwen3" else hidden_size // num_heads
    head_dim = fields.integer("head_dim", silent)
    if head_dim % 2:
        raise fields.error(f"head_dim is {head_dim}, must be even")
    return ModelShape(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_width=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        dtype_bytes=dtype_bytes,
    )


def _rope(fields: _Fields, max_position: int) -> RopeConfig:
    raw = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters") or {}  # 4.x, 5.x; transformers' order
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise fields.error("rotary parameters per layer type are not supported")
    inner = _Fields(fields.path, raw)
    theta = inner.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = raw.get("rope_type", raw.get("type")) or "default"
    if kind not in get_args(RopeKind):
        raise fields.error(f"rope type {kind!r} is not supported; supported are {', '.join(get_args(RopeKind))}")
    rotated = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise fields.error(f"partial_rotary_factor is {rotated}, only 1 is supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    original = max_position  # of dynamic too, whatever the object says: so does transformers
    if kind in ("llama3", "yarn"):
        within = inner.integer("original_max_position_embeddings", max_position)
        original = fields.integer("original_max_position_embeddings", within)
    factor = inner.number("factor", max_position / original if kind == "yarn" else None)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise fields.error(f"low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeConfig(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    if kind == "dynamic":
        return RopeConfig(theta, "dynamic", factor, original)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        attention_factor=inner.optional("attention_factor"),
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        mscale=inner.optional("mscale"),
        mscale_all_dim=inner.optional("mscale_all_dim"),
        truncate=bool(raw.get("truncate", True)),
    )


def _sliding_window(fields: _Fields, family: Family, num_layers: int) -> int | None:
    """The window of all layers. Raises ModelFolderError where layers differ."""
    raw = fields.raw
    if family == "llama" or (family != "mistral" and not raw.get("use_sliding_window")):
        return None
    if raw.get("sliding_window", _DEFAULT_WINDOW) is None:
        return None
    window = fields.integer("sliding_window", _DEFAULT_WINDOW)
    first = 0 if family == "mistral" else raw.get("max_window_layers", 28)  # layers from this one on have it
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if set(kinds) == {"sliding_attention"}:
        return window
    if set(kinds) == {"full_attention"} and family != "mistral":
        return None
    raise fields.error(
        f"sliding_window is {window} but not for all layers, which is not supported "
        f"(layer types {sorted(set(kinds))}, max_window_layers {raw.get('max_window_layers')})"
    )


def _special_tokens(
    fields: _Fields, family: Family, generation: Mapping[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    bos, eos = _DEFAULT_BOS_EOS.get(family, (None, None))
    bos = fields.raw.get("bos_token_id", bos)
    eos = fields.raw.get("eos_token_id", eos)
    eos = eos if generation.get("eos_token_id") is None else generation["eos_token_id"]
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(value, int) for value in [*ids, 0 if bos is None else bos]):
        raise fields.error(f"bos_token_id {bos!r} and eos_token_id {eos!r} must be token ids")
    return bos, tuple(dict.fromkeys(ids))
