"""What the wrappers refuse before a kernel starts: a kernel that is handed a wrong size reads or writes elsewhere."""

from torch import Tensor


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A contiguous tensor of this shape on the device of `like`. Raises ValueError with both shapes."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {tensor.stride()} of {tuple(tensor.shape)}")


def output(name: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out` if it is given and fits, else a new tensor like `like`."""
    if out is None:
        return like.new_empty(shape)
    expect(name, out, shape, like)
    if out.dtype != like.dtype:
        raise ValueError(f"{name} has dtype {out.dtype}, expected {like.dtype}")
    return out
