"""What Triton's interpreter gets wrong and a GPU does not, put right."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_fp8_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to float8_e4m3fn by PyTorch: the interpreter of triton 3.6 to 3.9 rounds ties up and loses the carry into the
    exponent (124.5 becomes 64, not 128)."""
    convert = interpreter._convert_float

    def right(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.float8e4nv:
            return convert(values, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", right)
