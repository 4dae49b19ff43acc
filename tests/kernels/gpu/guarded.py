"""Tensors in the middle of a larger buffer: what a kernel writes beside them is found."""

import torch
from torch import Tensor

MARGIN = 256  # elements on both sides


class Guarded:
    """A contiguous tensor between two margins. The margins, and at first the tensor, are NaN (or the largest integer), so
    what is read from them shows in the result."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = torch.Size(shape).numel()
        if dtype == torch.float8_e4m3fn:  # has no fill; 0x7f is its NaN
            self._buffer = torch.full((count + 2 * MARGIN,), 0x7F, dtype=torch.uint8).view(dtype)
        else:
            poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
            self._buffer = torch.full((count + 2 * MARGIN,), poison, dtype=dtype)
        self.tensor: Tensor = self._buffer[MARGIN : MARGIN + count].view(shape)
        self._margins = self._outside()

    @classmethod
    def of(cls, values: Tensor) -> "Guarded":
        """A guarded copy."""
        guarded = cls(tuple(values.shape), values.dtype)
        guarded.tensor.copy_(values)
        return guarded

    def untouched(self) -> bool:
        """Whether the margins are what they were, bit for bit."""
        return torch.equal(self._margins, self._outside())

    def _outside(self) -> Tensor:
        buffer = self._buffer
        return torch.cat([side.contiguous().view(torch.uint8) for side in (buffer[:MARGIN], buffer[-MARGIN:])])
