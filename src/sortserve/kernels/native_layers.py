"""Decoder layers in one call of C++ (`cpu/layers.h`), for the rows of any step: next tokens, chunks of prompts, refills.

The parts of a layer take less time than PyTorch's calls for them: at one row of the 0.5B model norms, rotation, attention
and what lies between took 6 of 28 ms with int8 weights. Where products are not our own, `Model.run_segment` runs the same
part by part.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.kernels.attention import AttentionRows
from sortserve.kernels.ffn import GatedFfn
from sortserve.kernels.linear import Product
from sortserve.kernels.native import NativeFfn, NativeLinear, PackedPointer
from sortserve.kernels.norm import RmsNorm

Longs = NDArray[np.int64]


class LayerParts(Protocol):
    """One decoder layer's weights; `qkv` gives Q and K of all heads in rotary pairs, then V."""

    @property
    def input_norm(self) -> RmsNorm: ...
    @property
    def qkv(self) -> Product: ...
    @property
    def query_norm(self) -> RmsNorm | None: ...
    @property
    def key_norm(self) -> RmsNorm | None: ...
    @property
    def output(self) -> Product: ...
    @property
    def post_norm(self) -> RmsNorm: ...
    @property
    def ffn(self) -> GatedFfn: ...


@dataclass(frozen=True)
class LayersShape:
    """What the layers of a model have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    page_layers: int  # layers whose K/V one page holds
    window: int | None  # positions that a row sees, its own among them


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What each row runs of each layer, both int32 [layers, rows]: its FFN width, and how many values its attention hands
    on (0: it skips it)."""

    widths: Tensor
    attended: Tensor


_NORMS = ("input_norm", "post_norm", "query_norm", "key_norm")


class _Layer(ctypes.Structure):
    """`Layer` of layers.h."""

    _fields_ = (
        *((name, PackedPointer) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in _NORMS),
    )


class _Model(ctypes.Structure):
    """`Model` of layers.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "size", "block_tokens", "page_layers", "window")),
        ("rotations", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("wide", ctypes.c_int),
    )


class _Step(ctypes.Structure):
    """`Step` of layers.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "layers", "most_blocks")),
        *((name, ctypes.c_void_p) for name in ("positions", "sequences", "writes")),
        ("blocks", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("widths", "attended", "hidden", "pool")),
    )


class NativeLayers:
    """All layers of a model."""

    def __init__(self, layers: Sequence[LayerParts], shape: LayersShape, rotations: Tensor) -> None:
        """`rotations` complex64 [positions, 1, head_dim / 2]; every product of every layer is a native one."""
        self._shape = shape
        self._kept: list[object] = [rotations]  # what the structs point to
        self._dtype = layers[0].input_norm.weight.dtype
        self._layers = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))
        ffn = layers[0].ffn
        assert isinstance(ffn, NativeFfn)
        self._call = ffn.native.layers
        self._num_positions = len(rotations)
        self._hidden_size = len(layers[0].input_norm.weight)
        self._width = ffn.width
        self._model = _Model(
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_tokens,
            shape.page_layers,
            shape.window or 0,
            rotations.data_ptr(),
            layers[0].input_norm.eps,
            self._dtype == torch.float32,
        )

    def _layer(self, layer: LayerParts) -> _Layer:
        assert isinstance(layer.qkv, NativeLinear)
        assert isinstance(layer.output, NativeLinear)
        assert isinstance(layer.ffn, NativeFfn)
        packed = (layer.qkv.weight, layer.output.weight, layer.ffn.gate_up, layer.ffn.down)
        self._kept.append(packed)
        return _Layer(*(ctypes.pointer(one.made) for one in packed), *(self._norm(layer, name) for name in _NORMS))

    def _norm(self, layer: LayerParts, name: str) -> int | None:
        norm: RmsNorm | None = getattr(layer, name)
        if norm is None:
            return None
        weight = norm.weight.float()
        self._kept.append(weight)
        return weight.data_ptr()

    def settings(self, widths: Longs, attends: Longs) -> RowSettings:
        """What `run` takes; widths and attends (0 or 1) are [layers, rows]."""
        assert widths.shape == attends.shape, (widths.shape, attends.shape)
        assert 0 <= widths.min() <= widths.max() <= self._width, widths
        assert set(np.unique(attends).tolist()) <= {0, 1}, attends
        attended = attends * (self._shape.num_heads * self._shape.head_dim)
        return RowSettings(*(torch.from_numpy(np.ascontiguousarray(one, np.int32)) for one in (widths, attended)))

    def run(self, first: int, hidden: Tensor, rows: AttentionRows, pool: Tensor, settings: RowSettings) -> Tensor:
        """hidden [rows, hidden] through layers from `first` on, as `settings` tell; a new tensor. Writes K/V into `pool`
        [blocks of all pages, block_tokens, kv_width]."""
        num_layers, num_rows = settings.widths.shape
        assert hidden.shape == (num_rows, self._hidden_size), hidden.shape
        assert hidden.dtype == pool.dtype == self._dtype, (hidden.dtype, pool.dtype)
        assert 0 < num_layers <= len(self._layers) - first, num_layers
        self._check(rows, pool, num_rows, num_layers)
        out = hidden.clone(memory_format=torch.contiguous_format)
        step = _Step(
            num_rows,
            num_layers,
            rows.tables[0].shape[1],
            rows.positions.data_ptr(),
            rows.sequences.data_ptr(),
            None if rows.writes is None else rows.writes.data_ptr(),
            (ctypes.c_void_p * len(rows.tables))(*(one.data_ptr() for one in rows.tables)),
            settings.widths.data_ptr(),
            settings.attended.data_ptr(),
            out.data_ptr(),
            pool.data_ptr(),
        )
        layers = ctypes.byref(self._layers, first * ctypes.sizeof(_Layer))
        self._call(ctypes.byref(self._model), layers, ctypes.byref(step), torch.get_num_threads())
        return out

    def _check(self, rows: AttentionRows, pool: Tensor, num_rows: int, num_layers: int) -> None:
        """That every place which the call goes to lies in the tensors."""
        shape, tables = self._shape, rows.tables
        assert (rows.block_tokens, rows.page_layers, rows.window) == (
            shape.block_tokens,
            shape.page_layers,
            shape.window,
        )
        assert pool.shape[1:] == (shape.block_tokens, shape.num_kv_heads * shape.head_dim), pool.shape
        assert num_layers <= len(tables) * shape.page_layers, (num_layers, len(tables))
        assert all(one.shape == tables[0].shape for one in tables), tables
        assert all(one.shape == (num_rows,) for one in (rows.positions, rows.sequences)), rows
        assert rows.writes is None or (rows.writes.shape, rows.writes.dtype) == ((num_rows,), torch.bool), rows.writes
        assert all(one.dtype == torch.int64 for one in (rows.positions, rows.sequences, *tables))
        assert all(one.is_contiguous() for one in (rows.positions, rows.sequences, pool, *tables))
        most_positions = min(self._num_positions, tables[0].shape[1] * shape.block_tokens)
        for places, end in ((rows.positions, most_positions), (rows.sequences, len(tables[0]))):
            lowest, highest = (int(one) for one in places.aminmax())
            assert 0 <= lowest <= highest < end, places
