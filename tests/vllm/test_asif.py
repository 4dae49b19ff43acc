"""Through vLLM each request gets what its own sub-model alone would have said; float32, greedy, token by token."""

import random
from typing import Any

import pytest
import torch

from sortserve.engine.model_config import load_model_config
from tests.vllm.conftest import BUNDLED, Starter
from tests.vllm.engines import Engine

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("clean")]

MAX_TOKENS = 24
PROMPT_LENGTHS = (3, 20, 31, 33, 64, 70, 96, 130)  # around the block size of 32 and the step size of 64


def prompts(engine: Engine, lengths: tuple[int, ...], seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    vocab = load_model_config(BUNDLED).shape.vocab_size
    return [[rng.randrange(5, vocab) for _ in range(length)] for length in lengths]


def pinned(engine: Engine, place: int) -> dict[str, Any]:
    return {"sortserve_submodel": engine.ladder.entries[place].id}


def spread(engine: Engine, number: int) -> list[int]:
    """Places all over the ladder, out of order."""
    places = list(range(len(engine.ladder.entries)))
    random.Random(3).shuffle(places)
    return [places[i % len(places)] for i in range(number)]


@pytest.fixture
def preemptions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the requests that were preempted."""
    seen: list[str] = []
    preempt = engine.scheduler._preempt_request

    def spy(request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(request.request_id)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", spy)
    return seen


def test_mixed_depths_widths_and_skips_in_one_batch_are_each_as_alone(engine: Engine, preemptions: list[str]) -> None:
    """Twice as many requests as fit, prompts longer than a step, and memory for three: chunks and preemption."""
    places = spread(engine, 2 * len(engine.ladder.entries))
    lengths = tuple(PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(len(places)))
    asked = prompts(engine, lengths)
    together = engine.generate(asked, [pinned(engine, place) for place in places], MAX_TOKENS)
    assert preemptions, "memory was not short"
    assert any(step.had_prompt and len(step.rows) > 2 for step in engine.decider.steps), (
        "no prompt was mixed with others"
    )
    for prompt, place, result in zip(asked, places, together, strict=True):
        entry = engine.ladder.entries[place]
        assert result.tokens == engine.alone(prompt, place, MAX_TOKENS), f"{entry.id}, {len(prompt)} prompt tokens"
        assert result.told["submodels"] == [[entry.id, MAX_TOKENS]]


def test_alone_is_what_the_formulas_say(engine: Engine) -> None:
    """Against plain float64 formulas over the checkpoint's tensors, which know neither vLLM nor blocks nor segments."""
    from tests.engine.asif import Oracle

    oracle = Oracle(BUNDLED, load_model_config(BUNDLED))
    prompt = prompts(engine, (40,))[0]
    for place, entry in enumerate(engine.ladder.entries):
        tokens = engine.alone(prompt, place, 6)
        known = prompt + tokens
        for number, token in enumerate(tokens):
            count = len(prompt) + number
            widths = torch.tensor(entry.submodel.widths)[:, None].expand(-1, count)
            on = torch.ones(entry.submodel.depth, count, dtype=torch.bool)
            on[list(entry.submodel.skip_attention)] = False
            logits = oracle.logits(known[:count], widths, on)
            assert logits.max() - logits[token] < 1e-3, f"{entry.id}, output token {number}"


def test_full_depth_is_stock_vllm(engine: Engine, starter: Starter) -> None:
    asked = prompts(engine, PROMPT_LENGTHS)
    ours = engine.generate(asked, [pinned(engine, engine.ladder.full)] * len(asked), MAX_TOKENS)
    theirs = starter(BUNDLED, submodels=False).generate(asked, [None] * len(asked), MAX_TOKENS)
    assert [result.tokens for result in ours] == [result.tokens for result in theirs]


def test_arguments_that_make_no_sense_are_clamped(engine: Engine) -> None:
    """An exception in the scheduler would end the engine; whoever comes around our front end gets the full model."""
    prompt = prompts(engine, (11,))[0]
    senseless: list[dict[str, Any]] = [
        {"sortserve_submodel": "d99"},
        {"sortserve_submodel": 5},
        {"sortserve_floor": "nothing", "sortserve_ceiling": 1.5},
        {"sortserve_budget": [1, 2], "sortserve_slo": "maybe", "sortserve_kv": "both", "sortserve_arrival": "now"},
        {"sortserve_budget": [-1, -1, -1], "sortserve_arrival": 1e30},
        {"sortserve_budget": ["a", "b", "c"]},
    ]
    full = engine.alone(prompt, engine.ladder.full, 4)
    for arguments in senseless:
        assert engine.generate([prompt], [arguments], 4)[0].tokens == full, arguments
