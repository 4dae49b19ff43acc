"""Compiles kernels for an NVIDIA architecture where there is no GPU: what the interpreter accepts, the compiler may not.

`compiled(90)` replaces Triton's launcher: each launch inside is compiled down to machine code by the `ptxas` that comes
with Triton, from the same arguments (pointers aligned to 16 bytes, as PyTorch's are), and nothing runs. Only for
processes that were started without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one launch became."""

    name: str
    shared_bytes: int
    registers: int  # per thread
    stack_bytes: int  # per thread: spilled registers
    ptx: str


@contextmanager
def compiled(architecture: int) -> Iterator[list[Compiled]]:
    """Compile every launch inside for compute capability 80, 90, ...; the list fills with the results."""
    results: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        results.append(_compile(self, args, kwargs, architecture))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield results


def _compile(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: int) -> Compiled:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        plain = parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and not plain  # Triton makes a constant of it
        if parameter.is_constexpr or value is None or isinstance(value, bool) or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not plain:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resources(binary.asm["cubin"])
    return Compiled(kernel.__name__, binary.metadata.shared, registers, stack, binary.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    assert found is not None, told.stdout
    return int(found[1]), int(found[2])
