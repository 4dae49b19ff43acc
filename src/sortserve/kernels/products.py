"""Which products run on the CPU: chosen once, at start, by the format of the weights and what is there.

weights          there                                                  chosen
bfloat16         AVX-512 with BF16, and C++ compiled now or before      `native.py`
int8             AVX-512 with VNNI, and the same                        `native.py`
bfloat16, int8   else                                                   oneDNN's; `reason` says what was missing
others           anything                                               oneDNN's, or PyTorch's

One of them serves all numbers of rows: what a row gets must not depend on how many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sortserve.kernels.compiling import UnavailableError
from sortserve.kernels.ffn import GatedFfn, StaircaseFfn
from sortserve.kernels.linear import Linear, Product
from sortserve.kernels.linear_int8 import Int8Linear
from sortserve.kernels.native import Native, NativeFfn, NativeLinear
from sortserve.kernels.quantization import quantize


@dataclass(frozen=True)
class Products:
    """Makes the products of one format of weights. By default: oneDNN's, of weights in their own dtype."""

    int8: bool = False
    native: Native | None = None
    reason: str = ""  # why they are not native, where they would have been taken

    @property
    def name(self) -> str:
        """In words, for logs and answers."""
        library = "oneDNN" if torch.backends.mkldnn.is_available() else "PyTorch"  # type: ignore[no-untyped-call]
        return f"own products for AVX-512, {library}" if self.native is not None else library

    def linear(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> Product:
        """y = x W^T + b. `pack` False: over the weight's own memory, where that can be."""
        if self.native is not None and pack:
            return NativeLinear(self.native, weight, bias, int8=self.int8)
        return Int8Linear(*quantize(weight, "int8"), bias) if self.int8 else Linear(weight, bias, pack=pack)

    def ffn(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        boundaries: Sequence[int],
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> GatedFfn:
        """The gated FFN of a layer, in blocks that end at `boundaries` where it needs blocks."""
        make = (
            partial(StaircaseFfn, gate, up, down, boundaries)
            if self.native is None
            else partial(NativeFfn, self.native, gate, up, down)
        )
        made: GatedFfn = make(gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias, int8=self.int8)
        return made


def choose_products(dtype: torch.dtype, *, int8: bool, compile: bool = True) -> Products:
    """Products of weights of `dtype`, or int8 ones, for rows of `dtype`. `compile` False: none that need a compiler."""
    wanted = dtype == torch.bfloat16 or (int8 and dtype == torch.float32)
    if not wanted or not compile:
        return Products(int8)
    try:
        native = Native()
    except UnavailableError as error:
        return Products(int8, reason=str(error))
    if not native.multiplies(dtype, int8=int8):
        return Products(int8, reason="this processor has no avx512_bf16")
    return Products(int8, native)
