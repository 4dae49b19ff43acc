"""Weight-only quantization: error bounds, prefixes, and channels with nothing in them."""

import pytest
import torch

from sortserve.kernels import quantization
from sortserve.kernels.quantization import LARGEST, QuantKind, dequantize, quantize

KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    spread = torch.logspace(-3, 2, rows)[:, None]  # channels of very different size
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (33, 129)])
def test_error_is_half_a_step(kind: QuantKind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """int8: half a step of the channel. fp8: 2^-4 of the value (3 bits of mantissa), or half of its smallest step.
    A scale shared by two channels, or one that truncates, breaks both."""
    weight = _weight(*shape, dtype)
    before = weight.clone()
    values, scale = quantize(weight, kind)
    assert torch.equal(weight, before)
    assert values.shape == weight.shape
    assert scale.shape == shape[:1]
    assert scale.dtype == torch.float32
    error = (dequantize(values, scale, torch.float64) - weight.double()).abs()
    step = scale.double()[:, None]
    bound = 0.5 * step if kind == "int8" else torch.maximum(weight.double().abs() / 16, step * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert torch.allclose(scale * LARGEST[kind], weight.float().abs().amax(1), rtol=1e-6)
    if kind == "int8" and shape[1] > 1:
        truncated = torch.trunc(weight.double() / step) * step
        assert ((truncated - weight.double()).abs() > 0.6 * step).any()


@KINDS
def test_chunks_change_nothing(kind: QuantKind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(33, 129, torch.bfloat16)
    values, scale = quantize(weight, kind)
    monkeypatch.setattr(quantization, "_CHUNK_ELEMENTS", 300)
    chunked, chunked_scale = quantize(weight, kind)
    assert torch.equal(values.float(), chunked.float())
    assert torch.equal(scale, chunked_scale)


@KINDS
def test_rows_are_independent(kind: QuantKind) -> None:
    """Gate and up keep rows: the first rows of a matrix are those of the shorter matrix."""
    weight = _weight(33, 65)
    values, scale = quantize(weight, kind)
    prefix, prefix_scale = quantize(weight[:9], kind)
    assert torch.equal(values[:9].float(), prefix.float())
    assert torch.equal(scale[:9], prefix_scale)


@KINDS
def test_channels_of_zeros_and_of_dust(kind: QuantKind) -> None:
    weight = torch.zeros(3, 5)
    weight[1, 2] = 1e-44
    weight[2, 0] = -3.0
    values, scale = quantize(weight, kind)
    back = dequantize(values, scale, torch.float32)
    assert torch.isfinite(back).all()
    assert torch.equal(back[:2], torch.zeros(2, 5))
    assert scale[0] == scale[1] == 1.0
    assert back[2, 0] == pytest.approx(-3.0)


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind: QuantKind, bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, kind)
