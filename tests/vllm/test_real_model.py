"""A real 0.5B model through vLLM, float32: as alone, and at full depth as stock vLLM says."""

from pathlib import Path

import pytest

from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from tests.vllm.conftest import Starter
from tests.vllm.engines import BLOCK_TOKENS, Engine
from tests.vllm.test_asif import pinned, prompts

REAL_MODEL = Path("~/.cache/sortserve-models/qwen2.5-coder-0.5b-instruct").expanduser()
ROOM = {"kv_cache_memory_bytes": 128 << 20}

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def real(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """With five sub-models, and K/V memory for 352 tokens."""
    if not REAL_MODEL.is_dir():
        pytest.skip(f"no model at {REAL_MODEL}")
    shape = load_model_config(REAL_MODEL).shape
    deep, wide = shape.num_layers, shape.ffn_width
    shapes = ((deep // 4, wide), (deep // 2, wide // 2), (deep // 2, wide), (deep, wide // 2), (deep, wide))
    path = tmp_path_factory.mktemp("ladder") / "ladder.json"
    Ladder.of(shape, [Entry(f"{depth}-{width}", SubModel.make(depth, width)) for depth, width in shapes]).dump(path)
    return starter(REAL_MODEL, ladder_path=path, **ROOM)


def test_mixed_depths_and_widths_are_each_as_alone_and_full_depth_is_stock(real: Engine, starter: Starter) -> None:
    """Prompts longer than a step; all of them fit into memory, their answers do not."""
    asked = prompts(real, (28, 60, 61, 90, 92))
    together = real.generate(asked, [pinned(real, place) for place in range(5)], 12)
    assert sum(result.told["preemptions"] for result in together), "memory was not short"
    for place, (prompt, result) in enumerate(zip(asked, together, strict=True)):
        assert result.tokens == real.alone(prompt, place, 12), real.ladder.entries[place].id
    full = real.generate(asked, [pinned(real, real.ladder.full)] * len(asked), 12)
    stock = starter(REAL_MODEL, submodels=False, **ROOM).generate(asked, [None] * len(asked), 12)
    assert [result.tokens for result in full] == [result.tokens for result in stock]


def test_promotion_and_demotion_go_on_as_the_other_submodel_would(real: Engine) -> None:
    """Beside a pinned one: going deeper computes the context again, going shallower keeps it."""
    shallow, full = 2, real.ladder.full
    asked = prompts(real, (41, 43, 50))
    real.decider.program.update({41: [(0, shallow), (5, full)], 43: [(0, full), (5, shallow)]})
    up, down, _ = real.generate(asked, [real.free, real.free, pinned(real, full)], 12)
    for prompt, result, first, then in ((asked[0], up, shallow, full), (asked[1], down, full, shallow)):
        assert result.tokens[:5] == real.alone(prompt, first, 5)
        assert result.tokens[5:] == real.alone(prompt + result.tokens[:5], then, 7)
        assert result.told["switches"] == 1
    assert (up.told["recomputed_tokens"], down.told["recomputed_tokens"]) == (41 + 5 - 1, 0)


def test_a_cached_prefix_says_the_same(real: Engine) -> None:
    prompt = prompts(real, (2 * BLOCK_TOKENS + 6,))[0]
    for place in (1, real.ladder.full):
        alone = real.alone(prompt, place, 8)
        again = real.generate([prompt], [pinned(real, place)], 8)[0]
        assert (again.cached, again.tokens) == (2 * BLOCK_TOKENS, alone)
