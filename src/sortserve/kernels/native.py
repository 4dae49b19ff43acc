"""Products in C++ for x86 processors with AVX-512 (`cpu/product.h`, with formulas and layout), and their wrappers here.

They take the place of oneDNN's where they can be compiled (`compiling.py`), for bfloat16 and for int8 weights, at any number
of rows: at one row they read memory about as fast as it goes, oneDNN's at half of that; from 32 rows on both take the same
time. The gated FFN is one call. A width is a prefix there, so a ladder's widths need no blocks of their own. `reference` of
`linear.py`, `linear_int8.py` and `ffn.py` are the oracles.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sortserve.kernels.compiling import UnavailableError, library
from sortserve.kernels.ffn import FfnRows
from sortserve.kernels.quantization import quantize

SOURCE = Path(__file__).parent / "cpu" / "native.cpp"
PAIR, LANES = 64, 16  # outputs of a pair of panels, and of a group
INT8, BFLOAT16 = 1, 2  # bits of `features`


class _Matrix(ctypes.Structure):
    """`Matrix` of product.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "pairs", "steps")),
    )


PackedPointer = ctypes.POINTER(_Matrix)


class Native:
    """The compiled library."""

    def __init__(self) -> None:
        """Compile or load it, and try it once. Raises UnavailableError."""
        loaded = library(SOURCE)
        matrix, pointer = PackedPointer, ctypes.c_void_p
        self.linear: Any = loaded.linear
        self.linear.argtypes = (matrix, ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int, ctypes.c_int)
        self.linear.restype = None
        self.ffn: Any = loaded.ffn
        self.ffn.argtypes = (matrix, matrix, ctypes.c_int64, *[pointer] * 4, ctypes.c_int, ctypes.c_int)
        self.ffn.restype = None
        self.layers: Any = loaded.layers  # native_layers.py
        self.layers.argtypes = (pointer, pointer, pointer, ctypes.c_int)
        self.layers.restype = None
        self.formats: int = loaded.features()
        self._try()

    def multiplies(self, dtype: torch.dtype, *, int8: bool) -> bool:
        """Whether it has products of weights of `dtype`, or of int8 ones with rows of `dtype`."""
        if int8:
            return bool(self.formats & INT8) and dtype in (torch.bfloat16, torch.float32)
        return bool(self.formats & BFLOAT16) and dtype == torch.bfloat16

    def _try(self) -> None:
        """Raise UnavailableError if a product with numbers that are exact in every format is not exact."""
        weight = (torch.arange(5 * 9) % 7 - 3).view(5, 9).float()
        weight[:, 0] = 127.0  # scale 1
        x = (torch.arange(3 * 9) % 5 - 2).view(3, 9).to(torch.bfloat16)
        expected = x.float() @ weight.T
        for dtype, int8 in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
            if self.multiplies(dtype, int8=int8):
                got = NativeLinear(self, weight.to(dtype), int8=int8)(x.to(dtype)).float()
                if not torch.allclose(got, expected, rtol=0.01, atol=0.05):
                    raise UnavailableError("its products are wrong here")


class Packed:
    """One weight matrix as the library reads it; `made` points into `tensors`."""

    __slots__ = ("inputs", "is_int8", "made", "nbytes", "outputs", "tensors")

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """weight [outputs, inputs], bfloat16, or int8 with its scale [outputs]."""
        assert (weight.dtype, scale is None) in ((torch.bfloat16, True), (torch.int8, False)), weight.dtype
        self.outputs, self.inputs = weight.shape
        self.is_int8 = scale is not None
        per_word = 2 if scale is None else 4
        pairs, steps = -(-self.outputs // PAIR), -(-self.inputs // per_word)
        if weight.shape != (pairs * PAIR, steps * per_word):
            whole = weight.new_zeros(pairs * PAIR, steps * per_word)
            whole[: self.outputs, : self.inputs] = weight
            weight = whole
        words = weight.view(pairs, 2, PAIR // 2, steps, per_word).permute(0, 1, 3, 2, 4).contiguous()
        if scale is not None:
            words = words.view(torch.uint8).bitwise_xor_(128)  # + 128
        held = words, *(None if one is None else _padded(one, pairs * PAIR) for one in (scale, bias))
        self.tensors = tuple(one for one in held if one is not None)
        self.nbytes = sum(one.nbytes for one in self.tensors)
        pointers = (None if one is None else one.data_ptr() for one in held)
        self.made = _Matrix(*pointers, self.outputs, self.inputs, pairs, steps)

    def checked(self, x: Tensor) -> Tensor:
        """Rows as the library reads them, dense; of a dtype that it multiplies with these weights."""
        assert x.dtype == torch.bfloat16 or (self.is_int8 and x.dtype == torch.float32), x.dtype
        return _dense(x, self.inputs, x.dtype)


class NativeLinear:
    """y = x W^T + b, of one weight matrix [out_features, in_features]."""

    __slots__ = ("_native", "packed", "weight")

    def __init__(self, native: Native, weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> None:
        self.packed = True
        self._native = native
        self.weight = Packed(*_formatted(weight, int8), bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return self.weight.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, in whatever layout."""
        return self.weight.tensors

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> [rows, out_features], in the dtype of x."""
        return self._run(x, None)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, rounded once; neither argument is changed."""
        return self._run(x, residual)

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.weight.checked(x)
        rows = x.shape[0]
        out = x.new_empty(rows, self.weight.outputs)
        beside = None if residual is None else _dense(residual, self.weight.outputs, x.dtype)
        assert beside is None or beside.shape[0] == rows
        self._native.linear(
            self.weight.made,
            rows,
            x.data_ptr(),
            None if beside is None else beside.data_ptr(),
            out.data_ptr(),
            x.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out


class NativeFfn:
    """The staircase gated FFN of one layer in one call; the widths of its rows may be any."""

    boundaries: tuple[int, ...] = ()
    """No blocks: `plan_rows` has nothing to lay out but the widths."""

    def __init__(
        self,
        native: Native,
        gate: Tensor,  # [width, hidden]
        up: Tensor,  # [width, hidden]
        down: Tensor,  # [hidden, width]
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        int8: bool = False,
    ) -> None:
        self.native = native
        self.width = gate.shape[0]
        gates, ups = _formatted(gate, int8), _formatted(up, int8)
        bias = None if gate_bias is None or up_bias is None else _interleaved(gate_bias, up_bias)
        scale = None if gates[1] is None or ups[1] is None else _interleaved(gates[1], ups[1])
        self.gate_up = Packed(_interleaved(gates[0], ups[0]), scale, bias)
        self.down = Packed(*_formatted(down, int8), down_bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return self.gate_up.nbytes + self.down.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights, in whatever layout."""
        return (*self.gate_up.tensors, *self.down.tensors)

    def add_to(self, residual: Tensor, x: Tensor, rows: FfnRows) -> Tensor:
        """residual [rows, hidden] + FFN(x [rows, hidden]), rounded once; rows without an FFN keep their residual."""
        x = self.gate_up.checked(x)
        beside = _dense(residual, self.down.outputs, x.dtype)
        widths = rows.widths
        assert widths.dtype == torch.int32
        assert len(x) == len(beside) == len(widths) == rows.num_rows, (x.shape, beside.shape, widths.shape)
        assert rows.widest <= self.width, (rows.widest, self.width)
        out = torch.empty_like(beside)
        self.native.ffn(
            self.gate_up.made,
            self.down.made,
            rows.num_rows,
            widths.data_ptr(),
            x.data_ptr(),
            beside.data_ptr(),
            out.data_ptr(),
            x.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out


def _formatted(weight: Tensor, int8: bool) -> tuple[Tensor, Tensor | None]:
    """Weights in the format that they are multiplied in, and their scale."""
    return quantize(weight, "int8") if int8 else (weight, None)


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """16 rows of gate, the same 16 of up, and so on, filled up with zeros."""
    parts = [_padded(one, -(-len(one) // LANES) * LANES, one.dtype) for one in (gate, up)]
    return torch.stack([part.view(-1, LANES, *part.shape[1:]) for part in parts], 1).flatten(0, 2)


def _padded(one: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`one` in `dtype`, zeros appended to make its first dimension `size`."""
    whole = torch.zeros(size, *one.shape[1:], dtype=dtype)
    whole[: len(one)] = one
    return whole


def _dense(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """x, checked to be [rows, size] of `dtype`, contiguous."""
    assert x.device.type == "cpu", x.device
    assert x.dtype == dtype, x.dtype
    assert x.dim() == 2, x.shape
    assert x.shape[1] == size, (x.shape, size)
    return x.contiguous()
