"""Cached blocks are found by requests of the same sub-model, and by no other."""

import pytest

from tests.vllm.engines import BLOCK_TOKENS, Engine
from tests.vllm.test_asif import pinned, prompts

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("clean")]


def test_the_same_submodel_finds_them_and_says_the_same(engine: Engine) -> None:
    prompt = prompts(engine, (3 * BLOCK_TOKENS + 5,))[0]
    for place in range(len(engine.ladder.entries)):
        first, second = (engine.generate([prompt], [pinned(engine, place)], 8)[0] for _ in range(2))
        assert (first.cached, second.cached) == (0, 3 * BLOCK_TOKENS), engine.ladder.entries[place].id
        assert first.tokens == second.tokens


def test_another_submodel_does_not(engine: Engine) -> None:
    prompt = prompts(engine, (3 * BLOCK_TOKENS + 5,))[0]
    expected = [engine.alone(prompt, place, 8) for place in range(len(engine.ladder.entries))]
    assert engine.llm.reset_prefix_cache()
    for place, tokens in enumerate(expected):
        result = engine.generate([prompt], [pinned(engine, place)], 8)[0]
        assert result.cached == 0, engine.ladder.entries[place].id
        assert result.tokens == tokens


def test_without_salts_a_deep_request_would_take_a_shallow_ones_garbage(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug that the salts prevent, planted: it shows in the tokens, so the tests above can fail."""
    monkeypatch.setattr("sortserve.engine.vllm.sched.salt_of", lambda *args: "one for all")
    prompt = prompts(engine, (3 * BLOCK_TOKENS + 5,))[0]
    right = engine.alone(prompt, engine.ladder.full, 8)
    assert engine.llm.reset_prefix_cache()
    engine.generate([prompt], [pinned(engine, 0)], 1)
    wrong = engine.generate([prompt], [pinned(engine, engine.ladder.full)], 8)[0]
    assert wrong.cached == 3 * BLOCK_TOKENS
    assert wrong.tokens != right


def test_what_a_promoted_request_computed_again_is_found(engine: Engine) -> None:
    full = engine.ladder.full
    prompt = prompts(engine, (BLOCK_TOKENS + 2,))[0]
    engine.decider.program[len(prompt)] = [(0, 0), (5, full)]
    engine.generate([prompt], [engine.free], 8)
    engine.decider.program.clear()
    assert engine.generate([prompt], [pinned(engine, full)], 1)[0].cached == BLOCK_TOKENS


def test_a_clients_own_salt_still_counts(engine: Engine) -> None:
    from vllm import SamplingParams

    prompt = prompts(engine, (2 * BLOCK_TOKENS + 5,))[0]
    params = SamplingParams(max_tokens=1, temperature=0.0)
    cached = []
    for salt in ("a", "b", "a"):
        given = {"prompt_token_ids": prompt, "cache_salt": salt}
        cached.append(engine.llm.generate([given], [params], use_tqdm=False)[0].num_cached_tokens)
    assert cached == [0, 0, 2 * BLOCK_TOKENS]
