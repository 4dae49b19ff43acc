"""One set of weights on the device: read tensor by tensor, each gone from the host before the next one is read.

Plain row-major matrices: the Triton kernels take any width as a prefix of them, so nothing is packed or sliced.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.engine.checkpoint import LayerNames, WeightSource
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.weights import Progress, importance_order
from sortserve.kernels.gpu.ffn import GatedWeights
from sortserve.kernels.quantization import QuantKind, quantize
from sortserve.kernels.rope import pair_rows


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix [out, in] with its bias; `scale` [out] where the weight is int8 or fp8."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return sum(tensor.nbytes for tensor in (self.weight, self.bias, self.scale) if tensor is not None)


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One decoder layer. Q and K are in rotary pairs, and so are their norms (None but for Qwen3)."""

    input_norm: Tensor
    qkv: Matrix
    output: Matrix
    post_norm: Tensor
    ffn: GatedWeights
    query_norm: Tensor | None
    key_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """All weights of a model, on one device."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[DeviceLayer, ...]
    final_norm: Tensor
    head: Matrix  # the embedding's own memory where they are tied
    nbytes: int

    @property
    def head_bytes(self) -> int:
        """Bytes that the head takes beside the embedding."""
        return 0 if self.head.weight is self.embedding else self.head.nbytes


class DeviceLoader:
    """Reads a source's tensors onto a device and counts their bytes. `kind`: what matrices are quantized to from now on."""

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        self.nbytes = 0
        self.kind: QuantKind | None = None
        self._source = source
        self._device = device
        self._dtype = dtype

    def read(self, name: str, *, head_dim: int | None = None) -> Tensor:
        """The tensor on the device; its heads in rotary pairs if `head_dim` is given."""
        tensor = self._source.read(name, self._dtype).to(self._device)
        self.nbytes += tensor.nbytes
        return tensor if head_dim is None else pair_rows(tensor, head_dim)

    def matrix(self, *names: str, head_dim: int | None = None, bias: Tensor | None = None) -> Matrix:
        """These weights, one below the other; the first two in rotary pairs if `head_dim` is given. Quantized whole if that
        is asked for, so that every width of the ladder has the same values and scales."""
        tensors = [self.read(name, head_dim=head_dim if number < 2 else None) for number, name in enumerate(names)]
        return self.packed(torch.cat(tensors) if len(tensors) > 1 else tensors[0], bias)

    def packed(self, weight: Tensor, bias: Tensor | None = None) -> Matrix:
        """A weight that was read, in the format that is asked for; its bytes are counted anew."""
        if self.kind is None:
            return Matrix(weight, bias)
        values, scale = quantize(weight, self.kind)
        self.nbytes += values.nbytes + scale.nbytes - weight.nbytes
        return Matrix(values, bias, scale)

    def maybe(self, name: str | None, *, head_dim: int | None = None) -> Tensor | None:
        """`read`, or None where the model has no such tensor."""
        return None if name is None else self.read(name, head_dim=head_dim)


def load_device_weights(
    source: WeightSource,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sort_ffn: bool = False,
    kind: QuantKind | None = None,
    narrow_layers: frozenset[int] | None = None,
    progress: Progress | None = None,
) -> DeviceWeights:
    """Read every tensor once. `sort_ffn` as for the CPU: neurons by importance, for a checkpoint without a ladder.

    `kind`: matrices are kept as int8 or fp8 with a scale per output channel, in `narrow_layers` only if they are given. The
    embedding stays; a tied head is quantized beside it, which pays: the head is read at every step.
    """
    loader, names = DeviceLoader(source, device, dtype), source.names
    embedding = loader.read(names.embed)
    loader.kind = kind if narrow_layers is None else None
    head = Matrix(embedding) if config.tie_embeddings and loader.kind is None else loader.matrix(names.lm_head)
    layers = []
    for number, layer_names in enumerate(names.layers):
        loader.kind = kind if narrow_layers is None or number in narrow_layers else None
        layers.append(_load_layer(loader, layer_names, config.shape.head_dim, sort_ffn))
        if progress is not None:
            progress(number + 1, len(names.layers))
    final_norm = loader.read(names.final_norm)
    return DeviceWeights(embedding, tuple(layers), final_norm, head, loader.nbytes)


def _load_layer(loader: DeviceLoader, names: LayerNames, head_dim: int, sort_ffn: bool) -> DeviceLayer:
    biases = [
        loader.maybe(names.q_bias, head_dim=head_dim),
        loader.maybe(names.k_bias, head_dim=head_dim),
        loader.maybe(names.v_bias),
    ]
    present = [bias for bias in biases if bias is not None]
    return DeviceLayer(
        input_norm=loader.read(names.input_norm),
        qkv=loader.matrix(names.q, names.k, names.v, head_dim=head_dim, bias=torch.cat(present) if present else None),
        output=loader.matrix(names.o, bias=loader.maybe(names.o_bias)),
        post_norm=loader.read(names.post_norm),
        ffn=_load_ffn(loader, names, sort_ffn),
        query_norm=loader.maybe(names.q_norm, head_dim=head_dim),
        key_norm=loader.maybe(names.k_norm, head_dim=head_dim),
    )


def _load_ffn(loader: DeviceLoader, names: LayerNames, sort_ffn: bool) -> GatedWeights:
    gate, up, down = loader.read(names.gate), loader.read(names.up), loader.read(names.down)
    gate_bias, up_bias = loader.maybe(names.gate_bias), loader.maybe(names.up_bias)
    if sort_ffn:
        order = importance_order(down)
        gate, up, down = gate[order], up[order], down[:, order].contiguous()
        gate_bias = None if gate_bias is None else gate_bias[order]
        up_bias = None if up_bias is None else up_bias[order]
    gates, ups, downs = (loader.packed(weight) for weight in (gate, up, down))
    return GatedWeights(
        gates.weight,
        ups.weight,
        downs.weight,
        gates.scale,
        ups.scale,
        downs.scale,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=loader.maybe(names.down_bias),
    )
