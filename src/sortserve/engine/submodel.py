"""Sub-models as values: exit depth, FFN width per layer, and skipped attention.

A sub-model is immutable, hashable and canonical: settings above its exit do not exist, so two sub-models that compute
the same thing are equal. It is passed along with the rows that run it and never set on a module (SortedNet,
arXiv 2309.00255, nests sub-models as prefixes; once-for-all's `set_active_subnet` cannot serve two requests that differ).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that its costs follow from. All counts, except `dtype_bytes` (bytes per value of
    states), `weight_bytes` (bytes per weight; None: as many), `narrow_layers` (whose weights take `weight_bytes`, the others
    and the head `dtype_bytes`; None: all of them) and `kv_value_bytes` (as `weight_bytes`, of K/V)."""

    num_layers: int
    hidden_size: int
    ffn_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype_bytes: int = 2
    weight_bytes: int | None = None
    narrow_layers: frozenset[int] | None = None
    kv_value_bytes: int | None = None

    def is_narrow(self, layer: int | None) -> bool:
        """Whether a layer (None: the head) is one whose weights take `weight_bytes`."""
        return self.narrow_layers is None or layer in self.narrow_layers

    def bytes_per_weight(self, layer: int | None) -> int:
        """Bytes of one weight of a layer (None: of the head); scales of quantized ones, under 0.5 %, are left out."""
        narrow = self.weight_bytes is not None and self.is_narrow(layer)
        return self.weight_bytes if narrow else self.dtype_bytes  # type: ignore[return-value]

    @property
    def bytes_per_kv_value(self) -> int:
        """Bytes of one value of K or V."""
        return self.dtype_bytes if self.kv_value_bytes is None else self.kv_value_bytes

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention (Q, K, V, O), biases left out."""
        return self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def qkv_parameters(self) -> int:
        """The part of `attention_parameters` that Q, K and V take: one matrix, read even where attention is skipped."""
        return self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer at full width."""
        return self.attention_parameters + 3 * self.hidden_size * self.ffn_width

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.bytes_per_kv_value


@dataclass(frozen=True, slots=True, order=True)
class Cost:
    """What one decoded token costs at batch 1: `weight_bytes` read, and `flops` without attention over the context."""

    weight_bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class SubModel:
    """One nested sub-model.

    `depth`: layers 1..depth run. `widths[i]`: the first so many sorted FFN neurons of layer i run; 0 skips the FFN.
    `skip_attention`: layers, ascending, whose attention output is not added. Such a layer still writes its K and V, so
    that tokens of other sub-models can attend to it; the attention itself and O are what is saved.

    Raises ValueError for values that no model could run; `check` tells whether a given model can.
    """

    depth: int
    widths: tuple[int, ...]  # [depth]
    skip_attention: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}, must be at least 1")
        if len(self.widths) != self.depth:
            raise ValueError(f"{len(self.widths)} widths for depth {self.depth}: one per layer that runs is needed")
        if any(width < 0 for width in self.widths):
            raise ValueError(f"widths are {self.widths}, none may be negative")
        if list(self.skip_attention) != sorted(set(self.skip_attention)):
            raise ValueError(f"skip_attention is {self.skip_attention}, must be ascending without repeats")
        if self.skip_attention and not 0 <= self.skip_attention[0] <= self.skip_attention[-1] < self.depth:
            raise ValueError(f"skip_attention is {self.skip_attention}, must lie in [0, {self.depth})")

    @classmethod
    def make(
        cls, depth: int, width: int | Sequence[int], skip_attention: Iterable[int] = (), skip_ffn: Iterable[int] = ()
    ) -> "SubModel":
        """The canonical sub-model: what is said of layers at or above `depth` is dropped. `width` is one for all layers
        or one per layer. Raises ValueError like the constructor."""
        widths = [width] * depth if isinstance(width, int) else list(width)[:depth]
        for layer in skip_ffn:
            if layer < 0:
                raise ValueError(f"skip_ffn has layer {layer}, none may be negative")
            if layer < len(widths):
                widths[layer] = 0
        return cls(depth, tuple(widths), tuple(sorted({layer for layer in skip_attention if layer < depth})))

    @classmethod
    def full(cls, shape: ModelShape) -> "SubModel":
        """Every layer at full width."""
        return cls.make(shape.num_layers, shape.ffn_width)

    def check(self, shape: ModelShape) -> None:
        """Raise ValueError, naming value and limit, unless a model of `shape` has this sub-model."""
        if self.depth > shape.num_layers:
            raise ValueError(f"depth is {self.depth}, the model has {shape.num_layers} layers")
        if max(self.widths) > shape.ffn_width:
            raise ValueError(f"width is {max(self.widths)}, the model's FFN has {shape.ffn_width} neurons")

    def settings(self, start: int, end: int) -> "LayerSettings":
        """What decides the K/V written by layers [start, end): their widths, and whether their attention is added."""
        skipped = frozenset(self.skip_attention)
        return tuple((self.widths[layer], layer not in skipped) for layer in range(start, end))

    def cost(self, shape: ModelShape) -> Cost:
        """Bytes of weights read and FLOPs done for one token (embedding look-up left out, head counted)."""
        parameters = shape.head_parameters
        weight_bytes = parameters * shape.bytes_per_weight(None)
        for layer, width in enumerate(self.widths):
            attention = shape.qkv_parameters if layer in self.skip_attention else shape.attention_parameters
            own = attention + 3 * shape.hidden_size * width
            parameters += own
            weight_bytes += own * shape.bytes_per_weight(layer)
        return Cost(weight_bytes, 2 * parameters)

    def parameters(self, shape: ModelShape) -> int:
        """Number of weights this sub-model reads."""
        return self.cost(shape).flops // 2

    def name(self, shape: ModelShape) -> str | None:
        """`d12`, `d12-w50`; None where widths differ by layer or something is skipped (the ladder names those)."""
        if self.skip_attention or len(set(self.widths)) != 1 or self.widths[0] == 0:
            return None
        if self.widths[0] == shape.ffn_width:
            return f"d{self.depth}"
        return f"d{self.depth}-w{round(100 * self.widths[0] / shape.ffn_width)}"


LayerSettings = tuple[tuple[int, bool], ...]
"""(FFN width, attention on) of consecutive layers."""
