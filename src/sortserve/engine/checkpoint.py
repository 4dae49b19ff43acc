"""The weights of a model folder, checked before they are read and read one tensor at a time.

`Checkpoint.open` reads only the headers of the safetensors files and compares every name and shape with what the
configuration asks for, so that a wrong folder is refused in milliseconds and not after gigabytes. Memory of what `read`
returns is anonymous, never the mapped file.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from sortserve.engine.errors import ModelFolderError
from sortserve.engine.model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
_SHOWN_NAMES = 5  # of one kind in an error message
_POOL_SIZE = 1_048_573  # prime: see DummyCheckpoint

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Tensor names of one layer; None where the model has no such tensor. Matrices are [outputs, inputs]."""

    input_norm: str  # [hidden], before the attention
    q: str  # [num_heads * head_dim, hidden]
    k: str  # [num_kv_heads * head_dim, hidden]
    v: str  # [num_kv_heads * head_dim, hidden]
    o: str  # [hidden, num_heads * head_dim]
    post_norm: str  # [hidden], before the FFN
    gate: str  # [ffn, hidden]
    up: str  # [ffn, hidden]
    down: str  # [hidden, ffn]
    q_bias: str | None = None
    k_bias: str | None = None
    v_bias: str | None = None
    o_bias: str | None = None
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    q_norm: str | None = None  # [head_dim]
    k_norm: str | None = None  # [head_dim]

    def present(self) -> dict[str, str]:
        """Field -> tensor name, of the tensors that the model has."""
        names = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field: name for field, name in names.items() if name is not None}


@dataclass(frozen=True, slots=True)
class ModelNames:
    """Tensor names of a model, layer by layer. `lm_head` is `embed` where the embeddings are tied."""

    layers: tuple[LayerNames, ...]
    embed: str  # [vocab, hidden]
    final_norm: str  # [hidden]
    lm_head: str  # [vocab, hidden]

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelNames":
        """The names in the checkpoints of Llama, Mistral, Qwen2 and Qwen3, which agree."""
        layers = tuple(_layer_names(config, layer) for layer in range(config.shape.num_layers))
        embed = "model.embed_tokens.weight"
        return cls(layers, embed, "model.norm.weight", embed if config.tie_embeddings else "lm_head.weight")

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Tensor name -> shape, of every tensor of the model."""
        shape = config.shape
        hidden, ffn = shape.hidden_size, shape.ffn_width
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        by_field: Mapping[str, Shape] = {
            "input_norm": (hidden,),
            "q": (q_size, hidden),
            "k": (kv_size, hidden),
            "v": (kv_size, hidden),
            "o": (hidden, q_size),
            "post_norm": (hidden,),
            "gate": (ffn, hidden),
            "up": (ffn, hidden),
            "down": (hidden, ffn),
            "q_bias": (q_size,),
            "k_bias": (kv_size,),
            "v_bias": (kv_size,),
            "o_bias": (hidden,),
            "gate_bias": (ffn,),
            "up_bias": (ffn,),
            "down_bias": (hidden,),
            "q_norm": (shape.head_dim,),
            "k_norm": (shape.head_dim,),
        }
        shapes = {name: by_field[field] for layer in self.layers for field, name in layer.present().items()}
        vocabulary = (shape.vocab_size, hidden)
        return {self.embed: vocabulary, **shapes, self.final_norm: (hidden,), self.lm_head: vocabulary}


class WeightSource(Protocol):
    """Where a model takes its weights from."""

    @property
    def names(self) -> ModelNames:
        """What can be read."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous CPU tensor that the caller owns."""
        ...


class Checkpoint:
    """Tensors of a checked model folder; make one with `open`."""

    def __init__(self, names: ModelNames, files: Mapping[str, Path]) -> None:
        self.names = names
        self._files = files  # tensor name -> file

    @classmethod
    def open(cls, folder: Path, config: ModelConfig) -> "Checkpoint":
        """Check the folder's safetensors files against `config`.

        Raises ModelFolderError for missing, truncated or foreign files, and for tensors that are missing, unexpected,
        of another shape or quantized; it names them.
        """
        names = ModelNames.of(config)
        expected = names.shapes(config)
        found: dict[str, _Header] = {}
        for path in _weight_files(folder):
            for name, header in _read_headers(path).items():
                if name in found:
                    raise ModelFolderError(
                        f"tensor {name} is both in {found[name].path} and in {path}; remove one file"
                    )
                found[name] = header
        _check_tensors(folder, expected, found)
        return cls(names, {name: found[name].path for name in expected})

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` as `dtype`, contiguous, in memory of its own.

        The file is mapped anew for every tensor and unmapped before the return: a mapping that stays open keeps every
        page it has touched resident, a second copy of the checkpoint in the end. Reading all 1,202 MiB of the 0.5B
        model and keeping them peaked 1,464 MiB above the start, its biggest tensor (260 MiB) over what was kept; with
        one mapping for all reads it was 2,406 MiB (VmHWM, safetensors 0.8).
        """
        path = self._files[name]
        try:
            with _open(path) as file:
                mapped = file.get_tensor(name)
                return torch.empty(mapped.shape, dtype=dtype).copy_(mapped)
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(
                f"{path} cannot be read any more ({error}); was it replaced while loading?"
            ) from error


class DummyCheckpoint:
    """Seeded random weights of a configuration's shape, for benchmarks that need no quality.

    Matrices are normal with variance 1 / inputs, those that add to the residual stream smaller with depth, so that
    activations stay near 1. Values repeat a pool of about a million (billions of normals would take minutes). The
    pool's length is prime, so a matrix repeats a row only after that many rows.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.names = ModelNames.of(config)
        self._shapes = self.names.shapes(config)
        self._residual_scale = (2 * config.shape.num_layers) ** -0.5
        self._seed = seed
        self._pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(seed))

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` as `dtype`, contiguous; the same for the same seed, whatever the order of reads."""
        shape = self._shapes[name]
        if len(shape) == 1:
            is_norm = name.endswith("norm.weight")
            return self._fill(name, shape, 0.05, dtype).add_(1.0 if is_norm else 0.0)
        scale = shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= self._residual_scale
        return self._fill(name, shape, scale, dtype)

    def _fill(self, name: str, shape: Shape, scale: float, dtype: torch.dtype) -> torch.Tensor:
        pool = (self._pool * scale).to(dtype)
        result = torch.empty(shape, dtype=dtype)
        flat = result.view(-1)
        start = zlib.crc32(f"{self._seed} {name}".encode()) % _POOL_SIZE
        written = 0
        while written < flat.numel():
            count = min(_POOL_SIZE - start, flat.numel() - written)
            flat[written : written + count] = pool[start : start + count]
            written, start = written + count, 0
        return result


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says about one tensor."""

    path: Path
    shape: Shape
    dtype: str  # safetensors' name


def _layer_names(config: ModelConfig, layer: int) -> LayerNames:
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    qkv_bias = config.attention_bias
    return LayerNames(
        input_norm=f"model.layers.{layer}.input_layernorm.weight",
        q=f"{attention}.q_proj.weight",
        k=f"{attention}.k_proj.weight",
        v=f"{attention}.v_proj.weight",
        o=f"{attention}.o_proj.weight",
        post_norm=f"model.layers.{layer}.post_attention_layernorm.weight",
        gate=f"{mlp}.gate_proj.weight",
        up=f"{mlp}.up_proj.weight",
        down=f"{mlp}.down_proj.weight",
        q_bias=f"{attention}.q_proj.bias" if qkv_bias else None,
        k_bias=f"{attention}.k_proj.bias" if qkv_bias else None,
        v_bias=f"{attention}.v_proj.bias" if qkv_bias else None,
        o_bias=f"{attention}.o_proj.bias" if config.output_bias else None,
        gate_bias=f"{mlp}.gate_proj.bias" if config.mlp_bias else None,
        up_bias=f"{mlp}.up_proj.bias" if config.mlp_bias else None,
        down_bias=f"{mlp}.down_proj.bias" if config.mlp_bias else None,
        q_norm=f"{attention}.q_norm.weight" if config.qk_norm else None,
        k_norm=f"{attention}.k_norm.weight" if config.qk_norm else None,
    )


def _open(path: Path) -> Any:
    return safe_open(path, "pt")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model: one, or those that the index names."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin")):
            raise ModelFolderError(
                f"{folder} has only pytorch_model*.bin; convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise ModelFolderError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the weights")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelFolderError(
            f"{index} is not an index of safetensors files ({error!r}); download it again"
        ) from error
    foreign = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if foreign:
        raise ModelFolderError(f"{index} names {foreign[0]!r}, which is not a file of the folder")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelFolderError(f"{folder} lacks {_shown(missing)} named by {INDEX_FILE}; download the rest")
    return [folder / shard for shard in shards]


def _read_headers(path: Path) -> dict[str, _Header]:
    try:
        with _open(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: _Header(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes, {error}); download it again"
        ) from error


def _check_tensors(folder: Path, expected: Mapping[str, Shape], found: Mapping[str, _Header]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelFolderError(
            f"{folder} lacks {_shown(missing)} that config.json asks for; download the weights again"
        )
    # old Llama checkpoints store the rotary frequencies; a tied model may store its head once more
    unexpected = [
        name
        for name in found
        if name not in expected and not name.endswith(".rotary_emb.inv_freq") and name != "lm_head.weight"
    ]
    if unexpected:
        raise ModelFolderError(f"{folder} has {_shown(unexpected)} that its config.json does not describe")
    misshapen = [
        f"{name} is {list(found[name].shape)}, must be {list(shape)}"
        for name, shape in expected.items()
        if found[name].shape != shape
    ]
    if misshapen:
        raise ModelFolderError(f"{folder} does not fit its config.json: {_shown(misshapen)}")
    packed = [f"{name} ({found[name].dtype})" for name in expected if found[name].dtype not in _FLOAT_DTYPES]
    if packed:
        raise ModelFolderError(f"{folder} is quantized, use an unquantized checkpoint: {_shown(packed)}")


def _shown(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    items = list(names)
    more = f" and {len(items) - _SHOWN_NAMES} more" if len(items) > _SHOWN_NAMES else ""
    return ", ".join(items[:_SHOWN_NAMES]) + more
