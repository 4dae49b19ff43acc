"""All four families, tiny and random: sub-models against our own engine, which knows nothing of vLLM."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import Starter
from tests.vllm.engines import asif_ladder
from tests.vllm.test_asif import pinned

# CPU attention takes heads of 32 and more
SIZES: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
PROMPTS = [[7, 30, 2, 90, 41], [(3 * number + 5) % 101 for number in range(70)], [11] * 33, [88, 4]]


@pytest.mark.parametrize("case", CASES)
def test_submodels_say_what_the_native_engine_says(case: str, tmp_path: Path, starter: Starter) -> None:
    from tests.engine.drive import ask, greedy, load_engine, run
    from tests.engine.tiny_models import make_tiny

    family, changes = CASES[case]
    sizes = {name: value for name, value in SIZES.items() if not (family == "qwen2" and name == "head_dim")}
    make_tiny(tmp_path, family, seed=5, **sizes, **changes)
    ladder = asif_ladder(tmp_path)
    ladder.dump(tmp_path / "ladder.json")
    places = [place % len(ladder.entries) for place in range(2 * len(ladder.entries))]
    asked = [PROMPTS[number % len(PROMPTS)] for number in range(len(places))]
    engine = starter(tmp_path, ladder_path=tmp_path / "ladder.json", num_gpu_blocks_override=60)
    together = engine.generate(asked, [pinned(engine, place) for place in places], 8)
    native = load_engine(tmp_path)
    requests = [
        ask(f"r{number}", prompt, greedy(8, ignore_eos=True), submodel=ladder.entries[place].id)
        for number, (prompt, place) in enumerate(zip(asked, places, strict=True))
    ]
    for result, place, outcome in zip(together, places, run(native, requests), strict=True):
        assert result.tokens == outcome.tokens, ladder.entries[place].id


def test_without_a_ladder_neurons_are_sorted_as_the_native_engine_does(tmp_path: Path, starter: Starter) -> None:
    """Three quarters of unsorted neurons would be any three quarters."""
    from tests.engine.drive import ask, greedy, load_engine, run
    from tests.engine.tiny_models import make_tiny

    make_tiny(tmp_path, "llama", seed=6, **SIZES, mlp_bias=True, intermediate_size=1024)
    engine = starter(tmp_path)
    assert [entry.id for entry in engine.ladder.entries] == ["d6-w75", "d6"]
    results = engine.generate(PROMPTS, [pinned(engine, 0)] * len(PROMPTS), 8)
    native = load_engine(tmp_path)
    requests = [
        ask(f"r{number}", prompt, greedy(8, ignore_eos=True), submodel="d6-w75")
        for number, prompt in enumerate(PROMPTS)
    ]
    assert [result.tokens for result in results] == [outcome.tokens for outcome in run(native, requests)]
