"""`--kv-dtype fp8`: what it does to the memory, and where it is refused; what it computes is in cuda/test_asif.py."""

from pathlib import Path

import pytest

from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.errors import StartupError
from sortserve.engine.vllm.start import check_settings
from sortserve.server.cli import BUNDLED


def test_the_same_memory_holds_twice_as_many_tokens() -> None:
    """On a simulated device: everything but the numbers themselves is the real engine's."""
    wide, narrow = (
        Engine.load(EngineConfig(BUNDLED, simulates="h100", dtype="bfloat16", kv_bytes=4 << 20, kv_dtype=kind)).info
        for kind in ("auto", "fp8")
    )
    assert (wide.kv_dtype, narrow.kv_dtype) == ("bfloat16", "fp8")
    assert narrow.kv_blocks == 2 * wide.kv_blocks
    assert narrow.kv_bytes == wide.kv_bytes


def test_it_is_refused_where_nothing_reads_it() -> None:
    config = EngineConfig(BUNDLED, device="cpu", kv_dtype="fp8")
    with pytest.raises(StartupError, match="needs a CUDA GPU") as caught:
        Engine.load(config)
    assert caught.value.param == "kv_dtype"
    with pytest.raises(StartupError, match="kv_cache_dtype=fp8"):
        check_settings(EngineConfig(Path("model"), kv_dtype="fp8"), cpu=False)
