"""Which device is chosen, and what is said where a GPU cannot be had."""

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from sortserve.engine.config import EngineConfig
from sortserve.engine.cuda.start import CudaStart
from sortserve.engine.errors import MemoryBudgetError, StartupError
from sortserve.engine.model_config import load_model_config
from sortserve.kernels import dispatch
from tests.engine.tiny_models import make_tiny


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), *, triton: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Test GPU {index}")
    if not triton:

        def missing(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(dispatch, "version", missing)


def test_auto_takes_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    chosen = dispatch.choose("auto")
    assert (chosen.device, chosen.name, chosen.is_cuda) == ("cuda:0", "Test GPU 0", True)
    assert "triton" in chosen.kernels
    assert "sm_90" in chosen.kernels
    assert dispatch.choose("cuda:1").name == "Test GPU 1"
    assert dispatch.choose("cpu").device == "cpu"


@pytest.mark.parametrize(
    ("gpu", "asked", "words"),
    [
        pytest.param({"triton": False}, "cuda", "triton is not installed", id="no triton"),
        pytest.param({"capability": (7, 5)}, "cuda:1", "7.5, not 8.0", id="too old"),
        pytest.param({}, "cuda:2", "there are 2 CUDA GPUs", id="no such GPU"),
    ],
)
def test_a_gpu_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], asked: str, words: str) -> None:
    """Asked for, it is an error that says what is missing; `auto` runs on the CPU and says the same."""
    with_gpu(monkeypatch, **gpu)
    with pytest.raises(ValueError, match=words):
        dispatch.choose(asked)
    if asked == "cuda":
        assert words in dispatch.choose("auto").reason
        assert dispatch.choose("auto").device == "cpu"


def test_too_little_memory_is_told_with_figures(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "model", "llama", head_dim=16)
    model = load_model_config(tmp_path / "model")
    start = CudaStart(EngineConfig(tmp_path / "model"), model, torch.device("cuda:0"), torch.bfloat16)
    start.check()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    assert 0 < start.kv_bytes(1 << 30) < 1 << 30
    with pytest.raises(MemoryBudgetError, match=str(3 << 30)):
        start.kv_bytes(3 << 30)


def test_fp8_needs_a_card_that_has_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "model", "llama", head_dim=16)
    config = EngineConfig(tmp_path / "model", kv_dtype="fp8")
    start = CudaStart(config, load_model_config(tmp_path / "model"), torch.device("cuda:0"), torch.bfloat16)
    with_gpu(monkeypatch, (8, 9))
    start.check()
    with_gpu(monkeypatch, (8, 6))
    with pytest.raises(StartupError, match="fp8 K/V needs compute capability") as refused:
        start.check()
    assert refused.value.param == "kv_dtype"


@pytest.mark.parametrize(
    ("head_dim", "settings", "param"), [(16, {"block_tokens": 8}, "block_tokens"), (8, {}, "device")]
)
def test_sizes_that_the_kernels_do_not_take(tmp_path: Any, head_dim: int, settings: dict[str, Any], param: str) -> None:
    make_tiny(tmp_path / "model", "llama", head_dim=head_dim)
    config = EngineConfig(tmp_path / "model", **settings)
    start = CudaStart(config, load_model_config(tmp_path / "model"), torch.device("cuda:0"), torch.bfloat16)
    with pytest.raises(StartupError) as refused:
        start.check()
    assert refused.value.param == param
