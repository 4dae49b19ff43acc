"""A real 0.5B model through vLLM, float32: as alone, and at full depth as stock vLLM says."""

from pathlib import Path

import pytest

from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from tests.vllm.conftest import Starter
from tests.vllm.test_asif import pinned, prompts

REAL_MODEL = Path("~/.cache/sortserve-models/qwen2.5-coder-0.5b-instruct").expanduser()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_mixed_depths_and_widths_are_each_as_alone_and_full_depth_is_stock(starter: Starter, tmp_path: Path) -> None:
    if not REAL_MODEL.is_dir():
        pytest.skip(f"no model at {REAL_MODEL}")
    shape = load_model_config(REAL_MODEL).shape
    deep, wide = shape.num_layers, shape.ffn_width
    shapes = ((deep // 4, wide), (deep // 2, wide // 2), (deep // 2, wide), (deep, wide // 2), (deep, wide))
    path = tmp_path / "ladder.json"
    Ladder.of(shape, [Entry(f"{depth}-{width}", SubModel.make(depth, width)) for depth, width in shapes]).dump(path)
    room = {"kv_cache_memory_bytes": 128 << 20}
    engine = starter(REAL_MODEL, ladder_path=path, **room)
    asked = prompts(engine, (5, 30, 64, 70, 130))
    together = engine.generate(asked, [pinned(engine, place) for place in range(5)], 12)
    for place, (prompt, result) in enumerate(zip(asked, together, strict=True)):
        assert result.tokens == engine.alone(prompt, place, 12), engine.ladder.entries[place].id
    full = engine.generate(asked, [pinned(engine, engine.ladder.full)] * len(asked), 12)
    stock = starter(REAL_MODEL, submodels=False, **room).generate(asked, [None] * len(asked), 12)
    assert [result.tokens for result in full] == [result.tokens for result in stock]
